#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <string>
#include <utility>

#include "../tests/event.hpp"
#include "../tests/random_events.hpp"
#include "../tests/session.hpp"
#include "modelyard/yard.hpp"

// Bytes become events; every event is judged by a naive second model of the yard and by the yard's
// own audit. At the end everybody releases, every waiting ticket must end, all models are taken out
// and the ledger must be zero.

namespace {

void stop_on(const std::optional<std::string>& violation) {
  if (!violation) return;
  std::fprintf(stderr, "%s\n", violation->c_str());
  std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace modelyard;
  using namespace modelyard::test;
  ByteSource source(data, size);
  const YardOptions options = draw_options(source);
  Result<Yard> made = Yard::create(options);
  if (!made.ok()) std::abort();  // draw_options gives valid ones only.
  Session session(std::move(made).value(), options);
  EventMaker maker(source, 8);
  while (!source.empty() && !session.violation()) session.step(maker.next(session.referee()));
  stop_on(session.violation());
  session.settle();
  stop_on(session.violation());
  session.tear_down();
  stop_on(session.violation());
  return 0;
}
