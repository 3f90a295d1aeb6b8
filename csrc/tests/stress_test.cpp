#include <gtest/gtest.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <variant>
#include <vector>

#include "event.hpp"
#include "modelyard/yard.hpp"

// The yard is not thread-safe and says so: its owner holds a lock. This is such an owner, with
// clients, loaders and a clock in threads of their own. Under ThreadSanitizer it shows that nothing
// in the core is shared behind the lock's back, neither within a yard nor between two of them.

namespace modelyard::test {
namespace {

class Shell {
 public:
  Shell(YardOptions options, std::uint32_t model_count, std::uint32_t seed)
      : yard_(make(std::move(options))), random_(seed) {
    const ShareId shared = yard_.add_share(Bytes{15}).value();
    for (std::uint32_t i = 0; i < model_count; ++i) {
      ModelSpec spec;
      spec.label = "model " + std::to_string(i);
      const auto bytes = static_cast<std::int64_t>(5 + random_() % 30);
      spec.placements = {charge({{i % 2, bytes}})};
      if (i % 5 == 0) spec.placements.push_back(charge({{0, bytes}, {1, bytes}}));
      if (i % 3 == 0) {
        spec.shares = {shared};
        spec.shares_on.assign(spec.placements.size(), device(0));
      }
      models_.push_back(yard_.add_model(std::move(spec)).value());
    }
  }

  // One request from beginning to end: the fast way if the model is there, a ticket if not. False
  // if it was refused.
  bool serve(ModelId model, std::optional<Duration> patience, bool give_up) {
    std::unique_lock lock(mutex_);
    const auto hit = yard_.try_acquire(model, now());
    if (!hit.ok()) return fail("try_acquire: " + hit.error().message);
    if (hit.value()) {
      lock.unlock();
      std::this_thread::yield();
      lock.lock();
      return release(*hit.value());
    }
    Actions out;
    const Tick deadline = patience ? now() + *patience : kNever;
    const auto ticket = yard_.request(model, now(), deadline, out);
    if (!ticket.ok()) return fail("request: " + ticket.error().message);
    answers_[ticket.value()] = Answer{};
    carry_out(out);
    if (give_up && !answers_[ticket.value()].ended) {
      out.clear();
      if (!yard_.cancel(ticket.value(), now(), out).ok()) return fail("cancel failed");
      answers_.erase(ticket.value());
      carry_out(out);
      return false;
    }
    answered_.wait(lock, [&] { return answers_[ticket.value()].ended; });
    const std::optional<LeaseId> lease = answers_[ticket.value()].lease;
    answers_.erase(ticket.value());
    if (!lease) return false;
    return release(*lease);
  }

  // Ends loads or unloads until the shell closes.
  void work() {
    std::unique_lock lock(mutex_);
    for (;;) {
      job_.wait(lock, [&] { return !jobs_.empty() || closing_; });
      if (jobs_.empty()) return;
      const Job job = jobs_.front();
      jobs_.pop_front();
      lock.unlock();
      std::this_thread::yield();  // Where a real loader reads and a real unloader frees.
      lock.lock();
      Actions out;
      Status status = Done{};
      if (!job.load) {
        // What it shares may have been taken over since, or be its alone only now.
        status = yard_.unload_done(job.model, now(), yard_.exclusive(job.model), out);
      } else if (random_() % 50 == 0) {
        status = yard_.load_failed(job.model, now(), LoadFailure::kTransient, out);
      } else {
        status = yard_.load_done(job.model, now(), job.bytes, milliseconds{5}, out);
      }
      if (!status.ok()) fail("a worker's event: " + status.error().message);
      carry_out(out);
    }
  }

  // Lets time pass until the shell closes, and operates now and then.
  void run_clock() {
    for (std::uint32_t round = 0;; ++round) {
      {
        const std::unique_lock lock(mutex_);
        if (closing_) return;
        clock_ += milliseconds{5};
        if (wake_at_ <= clock_) {
          wake_at_ = kNever;
          Actions out;
          yard_.tick(now(), out);
          carry_out(out);
        }
        if (round % 64 == 0) operate(round / 64);
      }
      std::this_thread::yield();
    }
  }

  void close() {
    {
      const std::unique_lock lock(mutex_);
      closing_ = true;
    }
    job_.notify_all();
  }

  [[nodiscard]] const std::vector<ModelId>& models() const { return models_; }
  // The rest is for when all threads have ended.
  [[nodiscard]] const Yard& yard() const { return yard_; }
  [[nodiscard]] const std::string& failure() const { return failure_; }

 private:
  struct Answer {
    bool ended{false};
    std::optional<LeaseId> lease;
  };
  struct Job {
    ModelId model{};
    bool load{false};
    Charge bytes;  ///< Of a load.
  };

  static Yard make(YardOptions options) {
    Result<Yard> made = Yard::create(std::move(options));
    EXPECT_TRUE(made.ok());
    return std::move(made).value();
  }

  [[nodiscard]] Tick now() const { return clock_; }

  bool fail(std::string why) {
    if (failure_.empty()) failure_ = std::move(why);
    return false;
  }

  bool release(LeaseId lease) {
    Actions out;
    if (!yard_.release(lease, now(), out).ok()) return fail("release failed");
    carry_out(out);
    return true;
  }

  // Changes what an operator changes, and back.
  void operate(std::uint32_t round) {
    Actions out;
    const ModelId model = models_[round % models_.size()];
    bool good = true;
    switch (round % 7) {
      case 0:
        good = yard_.set_budget(device(0), Bytes{60}, now(), out).ok();
        break;
      case 1:
        good = yard_.set_budget(device(0), Bytes{100}, now(), out).ok();
        break;
      case 2:
        good = yard_.set_device_closed(device(1), true, now(), out).ok();
        break;
      case 3:
        good = yard_.set_device_closed(device(1), false, now(), out).ok();
        break;
      case 4:
        good = yard_.pin(model, now(), out).ok();
        carry_out(out);
        out.clear();
        good = good && yard_.unpin(model, now(), out).ok();
        break;
      case 5: {
        const Status lost = yard_.lost(model, now(), out);
        good = lost.ok() || lost.error().code == ErrorCode::kWrongState;
        break;
      }
      default:
        good = yard_.unload(model, now(), out).ok();
        break;
    }
    if (!good) fail("an operator's call failed");
    carry_out(out);
  }

  void carry_out(const Actions& out) {
    bool answered = false;
    for (const Action& action : out) {
      if (const auto* grant = std::get_if<Grant>(&action)) {
        answered = true;
        answers_[grant->ticket] = Answer{.ended = true, .lease = grant->lease};
      } else if (const auto* refuse = std::get_if<Refuse>(&action)) {
        answered = true;
        answers_[refuse->ticket] = Answer{.ended = true, .lease = std::nullopt};
      } else if (const auto* load = std::get_if<Load>(&action)) {
        jobs_.push_back(Job{load->model, true, yard_.entry(load->model)->held});
        job_.notify_one();
      } else if (const auto* unload = std::get_if<Unload>(&action)) {
        jobs_.push_back(Job{unload->model, false, Charge{}});
        job_.notify_one();
      } else if (const auto* wake = std::get_if<WakeAt>(&action)) {
        wake_at_ = wake->at;
      }
    }
    if (answered) answered_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable answered_;
  std::condition_variable job_;
  // All below are guarded by the mutex while threads run.
  Yard yard_;
  std::mt19937 random_;
  std::vector<ModelId> models_;
  std::map<TicketId, Answer> answers_;
  std::deque<Job> jobs_;
  Tick clock_{};
  Tick wake_at_{kNever};
  bool closing_{false};
  std::string failure_;
};

YardOptions two_devices() {
  YardOptions options;
  options.budgets = {Bytes{100}, Bytes{100}};
  options.overdue_after = milliseconds{200};
  options.backoff_initial = milliseconds{1};
  options.backoff_max = milliseconds{10};
  options.load_channels_per_device = 2;
  options.explain_capacity = 128;
  return options;
}

constexpr std::uint32_t kClients = 3;
constexpr std::uint32_t kRequests = 100000;

TEST(Stress, ManyThreadsBehindOneLockLeaveACleanYard) {
  // Two yards at once: a core with hidden state of its own would mix them up.
  Shell first(two_devices(), 24, 1);
  Shell second(two_devices(), 24, 2);
  std::atomic<std::uint32_t> served{0};
  std::atomic<std::uint32_t> not_served{0};
  std::vector<std::thread> background;
  std::vector<std::thread> clients;
  for (Shell* shell : {&first, &second}) {
    background.emplace_back([shell] { shell->work(); });
    background.emplace_back([shell] { shell->work(); });
    background.emplace_back([shell] { shell->run_clock(); });
    for (std::uint32_t client = 0; client < kClients; ++client) {
      clients.emplace_back([shell, client, &served, &not_served] {
        std::mt19937 random(client + 1);
        const auto& models = shell->models();
        for (std::uint32_t i = 0; i < kRequests / (2 * kClients); ++i) {
          // A few models get most of the requests.
          const std::size_t among = random() % 4 == 0 ? models.size() : 6;
          std::optional<Duration> patience;
          if (random() % 10 == 0) patience = milliseconds{1 + random() % 50};
          const bool good = shell->serve(models[random() % among], patience, random() % 40 == 0);
          ++(good ? served : not_served);
        }
      });
    }
  }
  for (std::thread& client : clients) client.join();
  for (Shell* shell : {&first, &second}) shell->close();
  for (std::thread& worker : background) worker.join();

  EXPECT_EQ(served + not_served, kRequests / (2 * kClients) * 2 * kClients);
  EXPECT_GT(served, kRequests / 2) << "too much is refused to say anything";
  for (const Shell* shell : {&first, &second}) {
    EXPECT_EQ(shell->failure(), "");
    const Yard& yard = shell->yard();
    const Status audit = yard.audit();
    EXPECT_TRUE(audit.ok()) << audit.error().message;
    EXPECT_EQ(yard.lease_count(), 0U);
    EXPECT_EQ(yard.waiting_count(), 0U);
    EXPECT_GT(yard.counters().load_count, 100U);
    EXPECT_GT(yard.counters().hit_count, 1000U);
    EXPECT_GT(yard.counters().eviction_count, 100U);
    for (std::uint32_t i = 0; i < 2; ++i) {
      const Account& account = yard.account(device(i));
      EXPECT_EQ(account.reserved, Bytes{0});
      EXPECT_EQ(account.draining, Bytes{0});
      EXPECT_LE(account.peak, Bytes{100}) << "at no time was a budget exceeded";
    }
  }
}

}  // namespace
}  // namespace modelyard::test
