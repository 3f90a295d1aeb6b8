// Shares on the host tier: copies hold them together, and they are charged once there too.

#include <gtest/gtest.h>

#include <vector>

#include "event.hpp"
#include "harness.hpp"
#include "modelyard/yard.hpp"
#include "tiered.hpp"

namespace modelyard::test {
namespace {

// --- Shares -------------------------------------------------------------------------------------

TEST(TierShares, AreChargedOnceThereToo) {
  Harness h(tiered({100}, 200));
  const ShareId base = h.add_share(40);
  const ModelId a = h.add_sharing("a", 10, {base});
  const ModelId b = h.add_sharing("b", 20, {base});
  const ModelId big = h.add("big", 100);
  h.warm(a);
  h.warm(b);
  h.request(big);
  EXPECT_EQ(h.said(), (Lines{"unload a keep", "unload b keep"}));
  EXPECT_EQ(h.tier().reserved, Bytes{70});
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_EQ(h.tier().resident, Bytes{50}) << "the share is what its liveliest copy is";
  EXPECT_EQ(h.tier().reserved, Bytes{20});
  EXPECT_FALSE(h.unload_done(b));
  EXPECT_EQ(h.tier().resident, Bytes{70});
  EXPECT_EQ(h.yard().copy_exclusive(a), Bytes{10});
  EXPECT_FALSE(h.unload(a));
  EXPECT_EQ(h.tier().draining, Bytes{10});
  EXPECT_EQ(h.copy_dropped(a, 11), ErrorCode::kInvalidArgument);
  EXPECT_FALSE(h.copy_dropped(a, 10));
  EXPECT_EQ(h.tier().used(), Bytes{60});
  EXPECT_EQ(h.yard().copy_exclusive(b), Bytes{60}) << "it holds the share alone now";
}

TEST(TierShares, ASplitGoesThroughCopies) {
  Harness h(tiered({100}, 200));
  const ShareId base = h.add_share(40);
  const ModelId a = h.add_sharing("a", 10, {base});
  const ModelId big = h.add("big", 100);
  h.warm(a);
  h.request(big);
  const ShareId while_made = h.split_share(base, 15);
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_EQ(h.tier().resident, Bytes{50});
  const ShareId while_kept = h.split_share(base, 5);
  EXPECT_EQ(h.entry(a).copy.shares, (std::vector<ShareId>{base, while_made, while_kept}));
  EXPECT_EQ(h.yard().copy_exclusive(a), Bytes{50});
  const ModelId part = h.add_sharing("part", 0, {while_kept});
  EXPECT_FALSE(h.remove(a));
  EXPECT_FALSE(h.copy_dropped(a));
  EXPECT_EQ(h.yard().share(base), nullptr)
      << "forgotten with the copy that was the last to have it";
  EXPECT_NE(h.yard().share(while_kept), nullptr);
  EXPECT_FALSE(h.remove(part));
}

TEST(TierShares, ACopyKeepsAShareThatNoModelIsMadeOfAnyMore) {
  Harness h(tiered({100}, 200));
  const ShareId base = h.add_share(40);
  const ModelId a = h.add_sharing("a", 10, {base});
  const ModelId big = h.add("big", 100);
  h.warm(a);
  h.warm(big);
  EXPECT_FALSE(h.update_placements(a, {charge({{0, 50}})}));
  ASSERT_NE(h.yard().share(base), nullptr);
  EXPECT_EQ(h.forget_share(base), ErrorCode::kWrongState);
  EXPECT_FALSE(h.copy_lost(a));
  ASSERT_NE(h.yard().share(base), nullptr) << "until its memory is back";
  EXPECT_FALSE(h.copy_dropped(a));
  EXPECT_EQ(h.yard().share(base), nullptr);
}

TEST(TierShares, AShareThatIsBeingDroppedIsAsGoodAsGone) {
  // Room for the copy of b would be there only if the share could stay, which is on its way out.
  Harness h(tiered({130}, 100));
  const ShareId base = h.add_share(40);
  const ModelId a = h.add_sharing("a", 0, {base});
  const ModelId b = h.add_sharing("b", 80, {base});
  const ModelId big = h.add("big", 130);
  h.warm(a);
  EXPECT_FALSE(h.set_closed(0, true));
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_FALSE(h.set_closed(0, false));
  h.warm(b);
  EXPECT_FALSE(h.unload(a));
  h.forget();
  h.request(big);
  EXPECT_EQ(h.said(), (Lines{"unload b"})) << "120 bytes do not fit; it is not held back in vain";
}

TEST(TierShares, AShareThatIsBeingDroppedIsTakenOverWhereThereIsRoomAnyway) {
  Harness h(tiered({130}, 140));
  const ShareId base = h.add_share(40);
  const ModelId a = h.add_sharing("a", 0, {base});
  const ModelId b = h.add_sharing("b", 50, {base});
  const ModelId big = h.add("big", 130);
  h.warm(a);
  EXPECT_FALSE(h.set_closed(0, true));
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_FALSE(h.set_closed(0, false));
  h.warm(b);
  EXPECT_FALSE(h.unload(a));
  h.forget();
  h.request(big);
  EXPECT_EQ(h.said(), (Lines{"unload b keep"}));
  EXPECT_EQ(h.tier().reserved, Bytes{90});
  EXPECT_EQ(h.yard().copy_exclusive(a), Bytes{0});
  EXPECT_FALSE(h.copy_dropped(a));
  EXPECT_EQ(h.tier().used(), Bytes{90});
}

TEST(TierShares, AVictimFreesOnlyWhatTheNewCopyDoesNotHold) {
  Harness h(tiered({70}, 100));
  const ShareId base = h.add_share(40);
  const ModelId a = h.add_sharing("a", 30, {base});
  const ModelId old = h.add("old", 30);
  const ModelId b = h.add_sharing("b", 30, {base});
  h.warm(a);
  h.warm(old);
  h.warm(b);
  ASSERT_EQ(h.tier().resident, Bytes{100}) << "70 of a, 30 of old";
  const ModelId big = h.add("big", 70);
  h.request(big);
  EXPECT_EQ(h.said(), (Lines{"drop_copy a"})) << "its 30 are enough: the share stays for b";
  EXPECT_FALSE(h.copy_dropped(a));
  EXPECT_EQ(h.said(), (Lines{"unload b keep"}));
  EXPECT_EQ(h.tier().used(), Bytes{100});
}

TEST(TierShares, WhatIsInUseStaysOnTheBooksWhenTheNextCopyOfItIsNotMade) {
  Harness h(tiered({100}, 200));
  const ShareId base = h.add_share(40);
  const ModelId a = h.add_sharing("a", 10, {base});
  const ModelId b = h.add_sharing("b", 20, {base});
  const ModelId big = h.add("big", 100);
  h.warm(a);
  EXPECT_FALSE(h.set_closed(0, true));
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_FALSE(h.set_closed(0, false));
  h.warm(b);
  h.request(big);
  ASSERT_EQ(h.copy_state(b), CopyState::kMaking);
  EXPECT_FALSE(h.unload(a));
  EXPECT_FALSE(h.copy_in_use(a));
  EXPECT_EQ(h.tier().draining, Bytes{10});
  EXPECT_EQ(h.tier().reserved, Bytes{60}) << "the share is what its liveliest copy is";
  EXPECT_FALSE(h.unload_done(b, charge({{0, 60}})));
  EXPECT_EQ(h.copy_state(b), CopyState::kNone) << "it could not be made";
  EXPECT_EQ(h.tier().used(), Bytes{50}) << "somebody may be reading all of a still";
  EXPECT_EQ(h.yard().copy_exclusive(a), Bytes{50});
  EXPECT_FALSE(h.copy_dropped(a));
  EXPECT_EQ(h.tier().used(), Bytes{0});
}

TEST(TierShares, WhatIsInUseIsThereForTheNextCopy) {
  // As in AShareThatIsBeingDroppedIsAsGoodAsGone, but the share stays for now.
  Harness h(tiered({130}, 120));
  const ShareId base = h.add_share(40);
  const ModelId a = h.add_sharing("a", 0, {base});
  const ModelId b = h.add_sharing("b", 80, {base});
  const ModelId big = h.add("big", 130);
  h.warm(a);
  EXPECT_FALSE(h.set_closed(0, true));
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_FALSE(h.set_closed(0, false));
  h.warm(b);
  EXPECT_FALSE(h.unload(a));
  EXPECT_FALSE(h.copy_in_use(a));
  h.forget();
  h.request(big);
  EXPECT_EQ(h.said(), (Lines{"unload b keep"}));
  EXPECT_EQ(h.tier().used(), Bytes{120});
  EXPECT_EQ(h.yard().copy_exclusive(a), Bytes{0});
  EXPECT_FALSE(h.copy_dropped(a));
  EXPECT_EQ(h.tier().used(), Bytes{120});
}

}  // namespace
}  // namespace modelyard::test
