// Models whose memory is gone though nobody asked for that.

#include <gtest/gtest.h>

#include "event.hpp"
#include "harness.hpp"
#include "modelyard/yard.hpp"

namespace modelyard::test {
namespace {

// --- Lost models --------------------------------------------------------------------------------

TEST(Lost, AnIdleModelIsUnloadedAndMayComeBack) {
  Harness h(lru({100}, 4));
  const ShareId shared = h.add_share(50);
  const ModelId a = h.add_sharing("a", 10, {shared});
  const ModelId b = h.add_sharing("b", 10, {shared});
  h.warm(a);
  h.warm(b);
  EXPECT_FALSE(h.lost(a));
  EXPECT_EQ(h.said(), Lines{"unload a"});
  const Explanation explained = h.explained(Decision::kLost).back();
  EXPECT_EQ(explained.model, a);
  EXPECT_EQ(explained.why, Why::kLost);
  EXPECT_EQ(explained.bytes, Bytes{10});
  EXPECT_EQ(explained.shared_bytes, Bytes{50});
  EXPECT_FALSE(h.unload_done(a));
  h.warm(a);
  EXPECT_EQ(h.used(), 70);
}

TEST(Lost, AModelInUseWaitsForItsRequests) {
  Harness h(lru({100}, 4));
  const ModelId a = h.add("a", 60);
  const LeaseId used = h.use(a);
  h.forget();
  EXPECT_FALSE(h.lost(a));
  EXPECT_EQ(h.said(), Lines{"drain a"});
  const TicketId ticket = h.request(a);
  EXPECT_TRUE(h.waiting(ticket)) << "it is not there any more";
  EXPECT_FALSE(h.lost(a)) << "and may be told twice";
  EXPECT_TRUE(h.said().empty());
  EXPECT_FALSE(h.release(used));
  EXPECT_EQ(h.said(), Lines{"unload a"});
  EXPECT_EQ(h.lost(a), ErrorCode::kWrongState);
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_EQ(h.said(), Lines{"load a"});
  EXPECT_EQ(h.lost(a), ErrorCode::kWrongState);
  EXPECT_FALSE(h.load_done(a));
  EXPECT_FALSE(h.release(ticket));
}

TEST(Lost, APinnedModelLeavesAndStaysPinned) {
  Harness h(lru({100}, 4));
  const ShareId shared = h.add_share(50);
  const ModelId a = h.add_sharing("a", 10, {shared});
  const ModelId b = h.add_sharing("b", 10, {shared});
  h.warm(a);
  h.warm(b);
  EXPECT_FALSE(h.pin(a));
  const TicketId used = h.request(a);
  EXPECT_FALSE(h.lost(a));
  EXPECT_EQ(h.yard().share(shared)->on(device(0)).pinned, 0U);
  EXPECT_EQ(h.state(a), State::kDraining);
  EXPECT_FALSE(h.release(used));
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_TRUE(h.entry(a).pinned);
  const TicketId ticket = h.request(a);
  EXPECT_FALSE(h.load_done(a));
  EXPECT_EQ(h.yard().share(shared)->on(device(0)).pinned, 1U);
  EXPECT_EQ(h.unload(a), ErrorCode::kPinned);
  EXPECT_FALSE(h.release(ticket));
}

TEST(Lost, ARemovedModelIsLostWhileItDrains) {
  Harness h(lru({100}, 4));
  const ModelId a = h.add("a", 60);
  EXPECT_EQ(h.lost(a), ErrorCode::kWrongState) << "it is cold";
  const LeaseId used = h.use(a);
  EXPECT_FALSE(h.remove(a));
  EXPECT_FALSE(h.lost(a));
  EXPECT_FALSE(h.release(used));
  EXPECT_FALSE(h.unload_done(a));
  EXPECT_EQ(h.lost(a), ErrorCode::kStaleId);
}

TEST(Lost, WhatComesBackIsForWhoWaits) {
  Harness h(lru({100}, 4));
  const ModelId pinned = h.add("pinned", 60);
  const ModelId b = h.add("b", 40);
  const ModelId c = h.add("c", 60);
  h.warm(pinned);
  EXPECT_FALSE(h.pin(pinned));
  const LeaseId used = h.use(b);
  EXPECT_FALSE(h.lost(pinned));
  const TicketId ticket = h.request(c);
  EXPECT_TRUE(h.waiting(ticket)) << "sixty are on their way";
  EXPECT_FALSE(h.unload_done(pinned));
  EXPECT_EQ(h.state(c), State::kLoading);
  EXPECT_FALSE(h.load_done(c));
  EXPECT_FALSE(h.release(ticket));
  EXPECT_FALSE(h.release(used));
}

}  // namespace
}  // namespace modelyard::test
