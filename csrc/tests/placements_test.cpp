// Where a model is loaded if it has a choice, and placements that change.

#include <gtest/gtest.h>

#include <map>
#include <vector>

#include "event.hpp"
#include "harness.hpp"
#include "modelyard/yard.hpp"

namespace modelyard::test {
namespace {

// --- Placements ---------------------------------------------------------------------------------

TEST(Yard, ThePreferredPlacementIsTakenIfNothingElseSpeaksAgainstIt) {
  Harness h(options({100, 100}));
  const ModelId a = h.add("a", {charge({{1, 50}}), charge({{0, 50}})});
  h.request(a);
  EXPECT_EQ(h.entry(a).placement, 0U);
  EXPECT_EQ(h.account(1).reserved, Bytes{50});
}

TEST(Yard, OfPlacementsThatFitTheOneThatLeavesMostRoomIsTaken) {
  Harness h(options({100, 200}));
  const ModelId a = h.add("a", {charge({{0, 50}}), charge({{1, 50}})});
  h.request(a);
  EXPECT_EQ(h.entry(a).placement, 1U);
}

TEST(Yard, APlacementThatDisplacesNobodyIsTaken) {
  Harness h(options({100, 100}));
  h.warm(h.add("resident", charge({{0, 80}})));
  const ModelId a = h.add("a", {charge({{0, 50}}), charge({{1, 50}})});
  h.request(a);
  EXPECT_EQ(h.said(), Lines{"load a"});
  EXPECT_EQ(h.entry(a).placement, 1U);
}

TEST(Yard, OtherwiseTheCheapestDisplacementIsTaken) {
  Harness h(options({100, 100}));
  const ModelId dear = h.add("dear", charge({{0, 80}}), 1000);
  const ModelId cheap = h.add("cheap", charge({{1, 80}}), 1);
  h.request(dear);
  h.request(cheap);
  EXPECT_FALSE(h.load_done(dear, charge({{0, 80}}), seconds{1000}));
  EXPECT_FALSE(h.load_done(cheap, charge({{1, 80}}), seconds{1}));
  for (const auto& lease : std::map(h.referee().leases())) EXPECT_FALSE(h.release(lease.first));
  h.forget();
  const ModelId a = h.add("a", {charge({{0, 50}}), charge({{1, 50}})});
  h.request(a);
  EXPECT_EQ(h.said(), Lines{"unload cheap"});
  EXPECT_FALSE(h.unload_done(cheap));
  EXPECT_EQ(h.entry(a).placement, 1U);
}

TEST(Yard, ABusyPlacementIsLeftForOneThatIdleModelsCanFree) {
  Harness h(options({100, 100}));
  const LeaseId lease = h.use(h.add("busy", charge({{0, 80}})));
  const ModelId idle = h.add("idle", charge({{1, 80}}));
  h.warm(idle);
  const ModelId a = h.add("a", {charge({{0, 50}}), charge({{1, 50}})});
  h.request(a);
  EXPECT_EQ(h.said(), Lines{"unload idle"});
  EXPECT_FALSE(h.release(lease));
}

TEST(Yard, NewPlacementsAreForTheNextLoad) {
  Harness h(options({100, 100}));
  const ModelId a = h.add("a", charge({{0, 50}}));
  h.warm(a);
  EXPECT_FALSE(h.update_placements(a, {charge({{1, 70}})}));
  EXPECT_EQ(h.held(a), charge({{0, 50}}));
  EXPECT_EQ(h.state(a), State::kResident);
  EXPECT_FALSE(h.unload(a));
  EXPECT_FALSE(h.unload_done(a));
  h.request(a);
  EXPECT_EQ(h.account(1).reserved, Bytes{70});
  EXPECT_EQ(h.account(0).used(), Bytes{0});
}

TEST(Yard, NewPlacementsDuringALoadDoNotTouchItsReservation) {
  Harness h(options({100, 100}));
  const ModelId a = h.add("a", {charge({{0, 50}}), charge({{1, 50}})});
  const TicketId ticket = h.request(a);
  EXPECT_FALSE(h.update_placements(a, {charge({{1, 10}})}));
  EXPECT_EQ(h.account(0).reserved, Bytes{50});
  EXPECT_FALSE(h.load_done(a, charge({{0, 50}})));
  EXPECT_EQ(h.account(0).resident, Bytes{50});
  EXPECT_FALSE(h.release(ticket));
}

TEST(Yard, AnOvershootAfterNewPlacementsDoesNotSpoilThem) {
  Harness h(options({100, 100}));
  const ModelId a = h.add("a", charge({{0, 50}}));
  const TicketId ticket = h.request(a);
  EXPECT_FALSE(h.update_placements(a, {charge({{1, 10}})}));
  EXPECT_FALSE(h.load_done(a, charge({{0, 60}})));
  ASSERT_EQ(h.entry(a).placements.size(), 1U);
  EXPECT_EQ(h.entry(a).placements[0], charge({{1, 10}})) << "60 on device 0 says nothing of it";
  EXPECT_FALSE(h.release(ticket));
}

TEST(Yard, AnEstimateThatWasCaughtOutIsNotTrustedAgain) {
  Harness h(options({100}));
  const ModelId a = h.add("a", {charge({{0, 50}}), charge({{0, 55}})});
  const TicketId ticket = h.request(a);
  EXPECT_FALSE(h.load_done(a, charge({{0, 60}})));
  EXPECT_EQ(h.entry(a).placements[0], charge({{0, 60}}));
  EXPECT_EQ(h.entry(a).placements[1], charge({{0, 55}})) << "the other alternative was not tried";
  EXPECT_FALSE(h.remeasured(a, charge({{0, 70}})));
  EXPECT_EQ(h.entry(a).placements[0], charge({{0, 70}}));
  EXPECT_FALSE(h.remeasured(a, charge({{0, 20}})));
  EXPECT_EQ(h.entry(a).placements[0], charge({{0, 70}})) << "an upper bound stays one";
  EXPECT_FALSE(h.release(ticket));
}

TEST(Yard, ASmallerPlacementLetsAWaitingModelLoad) {
  Harness h(options({100}));
  const LeaseId lease = h.use(h.add("busy", 60));
  const ModelId a = h.add("a", 80);
  h.request(a);
  h.forget();
  EXPECT_FALSE(h.update_placements(a, {charge({{0, 40}})}));
  EXPECT_EQ(h.said(), Lines{"load a"});
  EXPECT_FALSE(h.release(lease));
}

TEST(Yard, APlacementThatNeverFitsRefusesWhoWaits) {
  Harness h(options({100}));
  const LeaseId lease = h.use(h.add("busy", 60));
  const ModelId a = h.add("a", 80);
  const TicketId ticket = h.request(a);
  EXPECT_FALSE(h.update_placements(a, {charge({{0, 101}})}));
  ASSERT_TRUE(h.refused(ticket));
  EXPECT_EQ(h.refusal(ticket).reason, RefuseReason::kNeverFits);
  EXPECT_FALSE(h.release(lease));
}

TEST(Yard, BadPlacementsAreRefusedAndTheOldOnesStay) {
  Harness h(options({100}));
  const ModelId a = h.add("a", 50);
  EXPECT_EQ(h.update_placements(a, {}), ErrorCode::kInvalidArgument);
  EXPECT_EQ(h.update_placements(a, {charge({{1, 5}})}), ErrorCode::kInvalidArgument);
  EXPECT_EQ(h.update_placements(a, std::vector<Charge>(17, charge({{0, 5}}))),
            ErrorCode::kInvalidArgument);
  ASSERT_EQ(h.entry(a).placements.size(), 1U);
  EXPECT_EQ(h.entry(a).placements[0], charge({{0, 50}}));
}

}  // namespace
}  // namespace modelyard::test
