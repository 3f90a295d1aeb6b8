#include "policies/expert.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <map>
#include <random>
#include <string>

#include "policies/next_use.hpp"
#include "policy_reference.hpp"

namespace modelyard::test {
namespace {

constexpr EntryIndex kEntries = 5;

double weight_of(EntryIndex entry) { return 0.07 * (entry + 1); }
double seconds_of(EntryIndex entry) { return 5.0 / (entry + 1); }
Candidate candidate(EntryIndex entry) { return {entry, weight_of(entry), seconds_of(entry)}; }

// An expert, its history, and the slow one beside them, over random requests.
struct Course {
  explicit Course(std::string_view name) : expert(make_expert(name)) {
    for (EntryIndex entry = 0; entry < kEntries; ++entry) add(entry);
  }
  void add(EntryIndex entry) {
    history.add(entry);
    slow.add(entry);
    expert->on_add(entry);
  }
  void replace(EntryIndex entry, EntryIndex before) {
    add(entry);
    history.copy(entry, before);
    slow.copy(entry, before);
    expert->on_replace(entry, before);
  }
  void request(EntryIndex entry) {
    history.request(entry, clock);
    slow.request(entry, clock);
    expert->on_request(history, candidate(entry), clock);
  }
  // Few models are asked for often; silences now and then, beyond the base of the counts too.
  void step(std::mt19937& random) {
    const auto entry = static_cast<EntryIndex>(std::min(random() % kEntries, random() % kEntries));
    clock += random() % 50 == 0 ? 1 + random() % 200'000 : 1;
    if (random() % 40 == 0) add(entry);
    if (random() % 40 == 1) replace(entry, (entry + 1) % kEntries);
    request(entry);
  }

  std::unique_ptr<Expert> expert;
  History history;
  SlowHistory slow;
  RequestClock clock{0};
};

using Formula = std::function<double(const SlowHistory&, EntryIndex, RequestClock)>;

double per_weight(EntryIndex entry) { return seconds_of(entry) / weight_of(entry); }

void follows(std::string_view name, const Formula& formula) {
  for (std::uint32_t seed = 1; seed <= 5; ++seed) {
    SCOPED_TRACE(std::string(name) + ", seed " + std::to_string(seed));
    std::mt19937 random(seed);
    Course course(name);
    for (int i = 0; i < 500; ++i) {
      course.step(random);
      const RequestClock later = course.clock + random() % 3000;
      for (EntryIndex entry = 0; entry < kEntries; ++entry) {
        const double expected = formula(course.slow, entry, later);
        EXPECT_NEAR(course.expert->score(course.history, candidate(entry), later), expected,
                    1e-9 * expected + 1e-100);
      }
    }
  }
}

TEST(Experts, AreMadeByNameAndKnowTheirName) {
  for (const std::string_view name : kExperts) {
    const std::unique_ptr<Expert> expert = make_expert(name);
    ASSERT_NE(expert, nullptr) << name;
    EXPECT_EQ(expert->name(), name);
    EXPECT_EQ(expert->clone()->name(), name);
  }
  EXPECT_EQ(make_expert("ensemble"), nullptr);
}

TEST(Experts, LruFollowsItsFormula) {
  follows("lru", [](const SlowHistory& past, EntryIndex entry, RequestClock) {
    return past.times(entry).empty() ? 0.0 : static_cast<double>(past.times(entry).back());
  });
}

TEST(Experts, GapFollowsItsFormula) {
  follows("gap", [](const SlowHistory& past, EntryIndex entry, RequestClock now) {
    return per_weight(entry) * past.gap_rate(entry, now);
  });
}

TEST(Experts, MixFollowsItsFormula) {
  follows("mix", [](const SlowHistory& past, EntryIndex entry, RequestClock now) {
    return per_weight(entry) *
           std::sqrt(past.gap_rate(entry, now) * past.decayed_rate(entry, 1000, now));
  });
}

TEST(Experts, DecayFollowsItsFormula) {
  follows("decay", [](const SlowHistory& past, EntryIndex entry, RequestClock now) {
    return per_weight(entry) * past.decayed_rate(entry, 4000, now);
  });
}

TEST(Experts, GdsfFollowsItsFormula) {
  for (std::uint32_t seed = 1; seed <= 5; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937 random(seed);
    Course course("gdsf");
    std::map<EntryIndex, double> worth;
    double least = 0;
    for (int i = 0; i < 500; ++i) {
      const auto entry = static_cast<EntryIndex>(random() % kEntries);
      ++course.clock;
      if (random() % 40 == 0) course.replace(entry, (entry + 1) % kEntries);
      course.request(entry);
      worth[entry] = least + per_weight(entry) * course.slow.count(entry, 2000, course.clock);
      EXPECT_NEAR(course.expert->score(course.history, candidate(entry), course.clock),
                  worth[entry], 1e-9 * worth[entry]);
      if (random() % 5 == 0) {
        // Somebody leaves; a lower worth than before changes nothing.
        const double score = worth[static_cast<EntryIndex>(random() % kEntries)];
        course.expert->on_evict(score);
        least = std::max(least, score);
      }
    }
  }
}

// One in a hundred of how wrong a due time was, as a part of its gap and at most 1, goes into what
// the next due times may be wrong by.
TEST(Experts, DueFollowsItsFormula) {
  for (std::uint32_t seed = 1; seed <= 5; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937 random(seed);
    Course course("due");
    struct Expected {
      double due{0}, spread{1}, gap{0};
    };
    std::map<EntryIndex, Expected> expected;
    double irregularity = 0.6;
    double before = 0;
    for (int i = 0; i < 1000; ++i) {
      const auto entry =
          static_cast<EntryIndex>(std::min(random() % kEntries, random() % kEntries));
      course.clock += random() % 50 == 0 ? 1 + random() % 200'000 : 1;
      const auto clock = static_cast<double>(course.clock);
      if (random() % 20 == 0) {
        course.add(entry);
        expected[entry] = {.due = before};
      } else if (random() % 20 == 0) {
        course.replace(entry, (entry + 1) % kEntries);
        expected[entry] = expected[(entry + 1) % kEntries];
      }
      course.request(entry);
      before = clock;
      Expected& own = expected[entry];
      if (own.gap > 0) {
        irregularity =
            0.99 * irregularity + 0.01 * std::min(1.0, std::abs(clock - own.due) / own.gap);
      }
      const std::vector<RequestClock>& times = course.slow.times(entry);
      if (times.size() > 1) {
        const std::size_t gaps = std::min<std::size_t>(4, times.size() - 1);
        own.gap = static_cast<double>(times.back() - times[times.size() - 1 - gaps]) /
                  static_cast<double>(gaps);
        own.due = clock + own.gap;
        own.spread = std::max(1.0, irregularity * own.gap);
      }
      const RequestClock later = course.clock + random() % 3000;
      for (EntryIndex each = 0; each < kEntries; ++each) {
        const double worth =
            per_weight(each) /
            (expected[each].spread + std::abs(static_cast<double>(later) - expected[each].due));
        EXPECT_NEAR(course.expert->score(course.history, candidate(each), later), worth,
                    1e-9 * worth);
      }
    }
  }
}

TEST(Experts, ACurveOrdersModelsAsTheScoreDoes) {
  for (const std::string_view name : {"lru", "gap", "mix", "decay", "gdsf", "due"}) {
    std::mt19937 random(11);
    Course course(name);
    int compared = 0;
    for (int i = 0; i < 500; ++i) {
      course.step(random);
      const RequestClock later = course.clock + random() % 3000;
      const auto worth = [&](EntryIndex entry) {
        const Curve curve = course.expert->curve(course.history, entry, seconds_of(entry));
        const double since = static_cast<double>(later) - curve.late_after;
        const double late = course.expert->rises() ? std::abs(since) : std::max(0.0, since);
        return curve.top / (curve.span + late) /
               std::pow(weight_of(entry), course.expert->weight_power());
      };
      for (EntryIndex a = 0; a < kEntries; ++a) {
        for (EntryIndex b = 0; b < kEntries; ++b) {
          const double left = course.expert->score(course.history, candidate(a), later);
          const double right = course.expert->score(course.history, candidate(b), later);
          if (left >= right * (1 - 1e-9)) continue;  // Too near to tell.
          EXPECT_LT(worth(a), worth(b)) << name << " at " << later;
          ++compared;
        }
      }
    }
    EXPECT_GT(compared, 1000) << name;
  }
}

// --- Due

// An expert for models of one size and cost, and its history.
struct DueCourse {
  explicit DueCourse(EntryIndex models) {
    for (EntryIndex entry = 0; entry < models; ++entry) add(entry);
  }
  void add(EntryIndex entry) {
    history.add(entry);
    expert->on_add(entry);
  }
  void ask(EntryIndex entry) {
    history.request(entry, ++clock);
    expert->on_request(history, {entry, 0.1, 1}, clock);
  }
  [[nodiscard]] double score(EntryIndex entry, double seconds = 1) const {
    return expert->score(history, {entry, 0.1, seconds}, clock);
  }

  std::unique_ptr<Expert> expert{make_expert("due")};
  History history;
  RequestClock clock{0};
};

TEST(Due, OnACircleWhoIsNeededLastGoesFirst) {
  constexpr EntryIndex kModels = 12;
  DueCourse course(kModels);
  for (EntryIndex i = 0; i < 60 * kModels; ++i) course.ask(i % kModels);
  // The next one is 0, the one that has just been there comes last.
  for (EntryIndex entry = 1; entry < kModels; ++entry) {
    EXPECT_GT(course.score(entry - 1), course.score(entry)) << entry;
  }
  EXPECT_GT(course.score(0), 3 * course.score(kModels - 1)) << "and by much";
}

TEST(Due, WhereNothingIsRegularWaitingCountsForLittle) {
  std::mt19937 random(8);
  DueCourse course(12);
  for (int i = 0; i < 3000; ++i) course.ask(static_cast<EntryIndex>(random() % 12));
  // The same model at different moments of a wait, until its mean gap is over.
  course.ask(3);
  const auto gap = static_cast<RequestClock>(course.history.mean_gap(3));
  ASSERT_GT(gap, 2U);
  const double at_once = course.score(3);
  const double when_due = course.expert->score(course.history, {3, 0.1, 1}, course.clock + gap);
  EXPECT_GT(when_due, at_once);
  EXPECT_LT(when_due, 4 * at_once) << "on a circle it is as many times as much as the gap is long";
}

TEST(Due, AmongThoseAskedForOnceTheCostDecides) {
  DueCourse course(20);
  for (EntryIndex entry = 0; entry < 20; ++entry) course.ask(entry);
  EXPECT_EQ(course.score(0), course.score(19)) << "not who came last";
  EXPECT_LT(course.score(19, 1), course.score(0, 1.1));
  // Who was added later has been known for less long.
  course.add(20);
  course.ask(20);
  EXPECT_GT(course.score(20), course.score(19));
}

TEST(Due, WhoDoesNotComeBackLosesItsWorth) {
  DueCourse course(2);
  for (int i = 0; i < 10; ++i) course.ask(0);
  double before = course.score(0);
  for (int i = 0; i < 5; ++i) {
    for (int k = 0; k < 10; ++k) course.ask(1);
    EXPECT_LT(course.score(0), before);
    before = course.score(0);
  }
}

// --- Learning

TEST(LeastSquares, FindsTheLineThatMadeItsSamples) {
  std::mt19937 random(3);
  std::uniform_real_distribution<double> any(-2, 2);
  LeastSquares::Vector truth{};
  for (double& each : truth) each = any(random);
  LeastSquares model(LeastSquares::Vector{});
  for (int i = 0; i < 3000; ++i) {
    LeastSquares::Vector x{};
    for (double& each : x) each = any(random);
    double y = 0;
    for (std::size_t k = 0; k < x.size(); ++k) y += truth[k] * x[k];
    model.learn(x, y);
  }
  for (std::size_t k = 0; k < truth.size(); ++k) {
    EXPECT_NEAR(model.coefficients()[k], truth[k], 1e-2);
  }
}

// The textbook's way: minimise the weighted squares and the prior, by elimination.
TEST(LeastSquares, IsWhatTheNormalEquationsSay) {
  constexpr std::size_t n = LeastSquares::kFeatures;
  std::mt19937 random(4);
  std::uniform_real_distribution<double> any(-1, 1);
  LeastSquares::Vector prior{};
  for (double& each : prior) each = any(random);
  LeastSquares model(prior);
  // (sum of fading x x' + fading prior / variance) theta = sum of fading x y + the same of the
  // prior
  std::array<std::array<double, n + 1>, n> equations{};
  for (std::size_t i = 0; i < n; ++i) {
    equations[i][i] = 1 / 0.1;
    equations[i][n] = prior[i] / 0.1;
  }
  for (int sample = 0; sample < 400; ++sample) {
    LeastSquares::Vector x{};
    for (double& each : x) each = 3 * any(random);
    const double y = any(random);
    // It forgets only while it is surer than at the beginning. With so few directions and such long
    // vectors it is so from the first sample on.
    for (std::size_t i = 0; i < n; ++i) {
      for (double& each : equations[i]) each *= 0.9995;
      for (std::size_t j = 0; j < n; ++j) equations[i][j] += x[i] * x[j];
      equations[i][n] += x[i] * y;
    }
    model.learn(x, y);
  }
  for (std::size_t i = 0; i < n; ++i) {
    for (std::size_t row = 0; row < n; ++row) {
      if (row == i) continue;
      const double factor = equations[row][i] / equations[i][i];
      for (std::size_t j = i; j <= n; ++j) equations[row][j] -= factor * equations[i][j];
    }
  }
  for (std::size_t i = 0; i < n; ++i) {
    EXPECT_NEAR(model.coefficients()[i], equations[i][n] / equations[i][i], 2e-3);
  }
}

TEST(LeastSquares, TheSameSampleForEverMakesNothingGrow) {
  LeastSquares model(LeastSquares::Vector{});
  LeastSquares::Vector x{};
  x[0] = 1;
  x[3] = 2;
  for (int i = 0; i < 200'000; ++i) model.learn(x, 3);
  EXPECT_NEAR(model.predict(x), 3, 1e-3);
  x[7] = 1;  // A direction it has never seen.
  model.learn(x, 4);
  for (const double each : model.coefficients()) EXPECT_LT(std::abs(each), 10);
}

TEST(NextUse, LearnsWhoComesBackSoon) {
  // Some come back after 3 requests and then for long not at all; others every 40 requests. What
  // has just been used for the second time is worth little, which no rate can say.
  NextUse expert;
  History history;
  for (EntryIndex entry = 0; entry < 200; ++entry) {
    history.add(entry);
    expert.on_add(entry);
  }
  const auto candidate_of = [](EntryIndex entry) { return Candidate{entry, 0.05, 1}; };
  RequestClock clock = 0;
  EntryIndex pair = 20;
  EntryIndex steady = 0;
  const auto ask = [&](EntryIndex entry) {
    history.request(entry, ++clock);
    expert.on_request(history, candidate_of(entry), clock);
  };
  for (int i = 0; i < 6000; ++i) {
    ask(steady);
    steady = (steady + 1) % 20;
    ask(pair);
    if (i % 2 == 1) pair = pair == 199 ? 20 : pair + 1;
  }
  // The last of the pairs is 0 requests old, its one before some 300 requests away; the next steady
  // one comes at once.
  const EntryIndex gone = pair == 20 ? 199 : pair - 1;
  EXPECT_LT(expert.score(history, candidate_of(gone), clock),
            expert.score(history, candidate_of(steady), clock));
}

TEST(NextUse, StaysFiniteWhateverComes) {
  std::mt19937 random(5);
  Course course("next-use");
  for (int i = 0; i < 20'000; ++i) {
    course.step(random);
    for (EntryIndex entry = 0; entry < kEntries; ++entry) {
      const double score =
          course.expert->score(course.history, candidate(entry), course.clock + random() % 100'000);
      ASSERT_TRUE(std::isfinite(score));
      ASSERT_GT(score, 0);
    }
  }
}

TEST(NextUse, TheSameRequestsTeachTheSame) {
  const auto last_score = [] {
    std::mt19937 random(6);
    Course course("next-use");
    for (int i = 0; i < 5000; ++i) course.step(random);
    return course.expert->score(course.history, candidate(1), course.clock);
  };
  EXPECT_EQ(last_score(), last_score());
}

}  // namespace
}  // namespace modelyard::test
