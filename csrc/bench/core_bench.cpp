#include <benchmark/benchmark.h>

#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "modelyard/planner.hpp"
#include "modelyard/policy.hpp"
#include "modelyard/yard.hpp"

// What the hot calls of the core cost. Build without invariant checks (MODELYARD_INVARIANTS=OFF).

namespace modelyard {
namespace {

constexpr std::uint32_t kModels = 1000;
constexpr std::uint32_t kDevices = 8;
constexpr std::int64_t kUnit = 1 << 20;

// A benchmark of calls that fail measures nothing.
template <typename T>
T must(Result<T> result) {
  if (!result.ok()) std::abort();
  return std::move(result).value();
}

DeviceIndex device(std::uint32_t index) { return static_cast<DeviceIndex>(index); }

Yard make_yard(std::uint32_t devices, Bytes budget, std::string_view policy) {
  YardOptions options;
  options.budgets.assign(devices, budget);
  options.policy = policy;
  return must(Yard::create(std::move(options)));
}

// Adds a model and makes it resident, its request released.
ModelId add_resident(Yard& yard, const Charge& placement, double reload_seconds) {
  ModelSpec spec;
  spec.placements = {placement};
  spec.reload_seconds = reload_seconds;
  const ModelId model = must(yard.add_model(std::move(spec)));
  Actions out;
  must(yard.request(model, Tick{}, kNever, out));
  out.clear();
  must(yard.load_done(model, Tick{}, placement, std::chrono::seconds{1}, out));
  for (const Action& action : std::vector<Action>(out)) {
    if (const auto* grant = std::get_if<Grant>(&action)) {
      must(yard.release(grant->lease, Tick{}, out));
    }
  }
  return model;
}

// A request for one of 1,000 resident models and its end.
void BM_AcquireRelease(benchmark::State& state, std::string_view policy) {
  Yard yard = make_yard(1, Bytes{kModels * kUnit}, policy);
  std::vector<ModelId> models;
  for (std::uint32_t i = 0; i < kModels; ++i) {
    models.push_back(add_resident(yard, Charge(device(0), Bytes{kUnit}), 1));
  }
  std::mt19937 random(1);
  std::vector<ModelId> sequence(1 << 16);
  for (ModelId& each : sequence) each = models[random() % models.size()];
  Actions out;
  std::size_t i = 0;
  for (auto _ : state) {
    const auto lease = yard.try_acquire(sequence[i], Tick{});
    benchmark::DoNotOptimize(lease);
    must(yard.release(*lease.value(), Tick{}, out));
    i = (i + 1) & (sequence.size() - 1);
  }
  if (!out.empty()) std::abort();
  state.SetItemsProcessed(static_cast<std::int64_t>(state.iterations()));
}
BENCHMARK_CAPTURE(BM_AcquireRelease, ensemble, "ensemble");
BENCHMARK_CAPTURE(BM_AcquireRelease, gap, "gap");
BENCHMARK_CAPTURE(BM_AcquireRelease, lru, "lru");

// 1,000 residents on 1 to 3 of 8 devices each, with different worths.
struct Crowd {
  std::vector<Charge> charges;
  std::vector<double> reload_seconds;
  Bytes budget{};

  Crowd() {
    std::mt19937 random(2);
    std::vector<std::int64_t> used(kDevices, 0);
    for (std::uint32_t i = 0; i < kModels; ++i) {
      Charge held;
      const std::uint32_t parts = 1 + static_cast<std::uint32_t>(random() % 3);
      for (std::uint32_t part = 0; part < parts; ++part) {
        held.set(device((i + 3 * part) % kDevices),
                 Bytes{static_cast<std::int64_t>(1 + random() % 16) * kUnit});
      }
      held.for_each([&](DeviceIndex at, Bytes bytes) { used[position(at)] += bytes.value; });
      charges.push_back(held);
      reload_seconds.push_back(0.1 * static_cast<double>(1 + random() % 100));
    }
    for (const std::int64_t bytes : used) budget = std::max(budget, Bytes{bytes});
  }
};

// What a model that needs a tenth of every device makes leave: the answer, and nothing is touched.
void BM_Plan1000x8(benchmark::State& state, std::string_view policy) {
  const Crowd crowd;
  Yard yard = make_yard(kDevices, crowd.budget, policy);
  std::vector<ModelId> models;
  for (std::uint32_t i = 0; i < kModels; ++i) {
    models.push_back(add_resident(yard, crowd.charges[i], crowd.reload_seconds[i]));
  }
  std::mt19937 random(3);
  Actions out;
  for (int i = 0; i < 20000; ++i) {
    const auto lease = yard.try_acquire(models[random() % models.size()], Tick{});
    must(yard.release(*lease.value(), Tick{}, out));
  }
  Charge wanted;
  for (std::uint32_t i = 0; i < kDevices; ++i) {
    const Bytes free = yard.account(device(i)).free();
    wanted.set(device(i), free + Bytes{crowd.budget.value / 10});
  }
  ModelSpec spec;
  spec.placements = {wanted};
  const ModelId model = must(yard.add_model(std::move(spec)));
  std::size_t victims = 0;
  for (auto _ : state) {
    const auto plan = yard.plan_for(model);
    if (!plan) std::abort();
    victims = plan->victims.size();
    benchmark::DoNotOptimize(victims);
  }
  state.counters["victims"] = static_cast<double>(victims);
}
BENCHMARK_CAPTURE(BM_Plan1000x8, ensemble, "ensemble")->Unit(benchmark::kMicrosecond);
BENCHMARK_CAPTURE(BM_Plan1000x8, gap, "gap")->Unit(benchmark::kMicrosecond);
BENCHMARK_CAPTURE(BM_Plan1000x8, lru, "lru")->Unit(benchmark::kMicrosecond);

// The same without a yard round it. The argument says what part of a device is short, in percent.
void BM_PlannerOnly1000x8(benchmark::State& state) {
  const Crowd crowd;
  const std::unique_ptr<Policy> policy = make_policy("gap");
  std::vector<Resident> residents;
  for (std::uint32_t i = 0; i < kModels; ++i) {
    policy->on_add(i);
    residents.push_back(Resident{.entry = i,
                                 .held = &crowd.charges[i],
                                 .reload_seconds = crowd.reload_seconds[i],
                                 .leased = false});
  }
  std::mt19937 random(3);
  RequestClock clock = 0;
  for (int i = 0; i < 20000; ++i) {
    const auto entry = static_cast<EntryIndex>(random() % kModels);
    policy->on_request(Wish{.entry = entry,
                            .held = &crowd.charges[entry],
                            .weight = 1e-3,
                            .reload_seconds = crowd.reload_seconds[entry]},
                       ++clock);
  }
  const std::vector<Bytes> budgets(kDevices, crowd.budget);
  Charge shortfall;
  for (std::uint32_t i = 0; i < kDevices; ++i) {
    shortfall.set(device(i), Bytes{crowd.budget.value * state.range(0) / 100});
  }
  std::size_t victims = 0;
  for (auto _ : state) {
    const auto plan = plan_eviction(residents, shortfall, budgets, *policy, clock);
    if (!plan) std::abort();
    victims = plan->victims.size();
    benchmark::DoNotOptimize(victims);
  }
  state.counters["victims"] = static_cast<double>(victims);
}
BENCHMARK(BM_PlannerOnly1000x8)->Arg(1)->Arg(10)->Arg(50)->Unit(benchmark::kMicrosecond);

// A full turn of a miss that displaces one of 1,000 residents: request, unload, load, release.
void BM_RequestMissCycle(benchmark::State& state) {
  Yard yard = make_yard(1, Bytes{kModels * kUnit}, "gap");
  const Charge held(device(0), Bytes{kUnit});
  std::vector<ModelId> models;
  for (std::uint32_t i = 0; i < kModels; ++i) models.push_back(add_resident(yard, held, 1));
  std::vector<ModelId> away;
  for (std::uint32_t i = 0; i < 16; ++i) {
    ModelSpec spec;
    spec.placements = {held};
    away.push_back(must(yard.add_model(std::move(spec))));
  }
  Actions out;
  std::size_t i = 0;
  for (auto _ : state) {
    out.clear();
    must(yard.request(away[i], Tick{}, kNever, out));
    const auto* unload = std::get_if<Unload>(&out.at(0));
    if (unload == nullptr) std::abort();
    const ModelId victim = unload->model;
    out.clear();
    must(yard.unload_done(victim, Tick{}, held, out));
    must(yard.load_done(away[i], Tick{}, held, std::chrono::seconds{1}, out));
    const auto* grant = std::get_if<Grant>(&out.back());
    if (grant == nullptr) std::abort();
    const LeaseId lease = grant->lease;
    must(yard.release(lease, Tick{}, out));
    away[i] = victim;
    i = (i + 1) % away.size();
  }
  state.SetItemsProcessed(static_cast<std::int64_t>(state.iterations()));
}
BENCHMARK(BM_RequestMissCycle)->Unit(benchmark::kMicrosecond);

// Does what the yard asks for, at once and as expected, until it asks for nothing.
void follow(Yard& yard, Actions& todo, Actions& out) {
  for (std::size_t i = 0; i < todo.size(); ++i) {
    out.clear();
    const Action action = todo[i];
    if (const auto* unload = std::get_if<Unload>(&action)) {
      must(yard.unload_done(unload->model, Tick{}, yard.exclusive(unload->model), out));
    } else if (const auto* load = std::get_if<Load>(&action)) {
      const Entry& entry = *yard.entry(load->model);
      const std::chrono::duration<double> took(entry.reload_seconds);
      must(yard.load_done(load->model, Tick{}, Charge(entry.held),
                          std::chrono::duration_cast<Duration>(took), out));
    } else if (const auto* grant = std::get_if<Grant>(&action)) {
      must(yard.release(grant->lease, Tick{}, out));
    } else if (std::holds_alternative<Refuse>(action)) {
      std::abort();
    }
    todo.insert(todo.end(), out.begin(), out.end());
  }
}

// A request for one of `models` by Zipf's law (0.9), a fifth of whose bytes fit: what it displaces,
// its load and its release included, as a mean over hits and misses.
void BM_ArrivalWithShadows(benchmark::State& state, std::string_view policy) {
  const auto count = static_cast<std::size_t>(state.range(0));
  std::mt19937 random(7);
  std::vector<std::int64_t> bytes(count);
  std::int64_t all = 0;
  for (std::int64_t& each : bytes) all += each = (100 + random() % 8000) * kUnit;
  Yard yard = make_yard(1, Bytes{all / 5}, policy);
  std::vector<ModelId> models;
  std::vector<double> weights;
  for (std::size_t i = 0; i < count; ++i) {
    ModelSpec spec;
    spec.placements = {Charge(device(0), Bytes{bytes[i]})};
    spec.reload_seconds = 0.5 + static_cast<double>(bytes[i]) / 2e9;
    models.push_back(must(yard.add_model(std::move(spec))));
    weights.push_back(std::pow(static_cast<double>(i + 1), -0.9));
  }
  std::discrete_distribution<std::size_t> draw(weights.begin(), weights.end());
  std::vector<ModelId> sequence(1 << 16);
  for (ModelId& each : sequence) each = models[draw(random)];
  Actions todo;
  Actions out;
  std::size_t i = 0;
  const auto arrive = [&] {
    const ModelId model = sequence[i];
    i = (i + 1) & (sequence.size() - 1);
    todo.clear();
    if (const auto lease = must(yard.try_acquire(model, Tick{}))) {
      must(yard.release(*lease, Tick{}, todo));
    } else {
      must(yard.request(model, Tick{}, kNever, todo));
    }
    follow(yard, todo, out);
  };
  for (std::size_t warm_up = 0; warm_up < sequence.size() / 2; ++warm_up) arrive();
  const YardCounters before = yard.counters();
  for (auto _ : state) arrive();
  const YardCounters& after = yard.counters();
  state.counters["hits"] = static_cast<double>(after.hit_count - before.hit_count) /
                           static_cast<double>(after.request_count - before.request_count);
  state.SetItemsProcessed(static_cast<std::int64_t>(state.iterations()));
}
BENCHMARK_CAPTURE(BM_ArrivalWithShadows, ensemble, "ensemble")
    ->Arg(300)
    ->Arg(5000)
    ->Unit(benchmark::kMicrosecond);
BENCHMARK_CAPTURE(BM_ArrivalWithShadows, learned, "learned")
    ->Arg(300)
    ->Arg(5000)
    ->Unit(benchmark::kMicrosecond);
// Without shadows: what of it is the yard's own.
BENCHMARK_CAPTURE(BM_ArrivalWithShadows, gap, "gap")
    ->Arg(300)
    ->Arg(5000)
    ->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace modelyard
