// The clients' scenario in C++; client/SCENARIO.md says what each step is.

#include <algorithm>
#include <cstring>
#include <fstream>
#include <functional>
#include <iostream>
#include <random>
#include <set>
#include <sstream>
#include <stdexcept>

#include "modelyard.hpp"

namespace v1 = modelyard::v1;
using modelyard::Call;
using modelyard::ErrorDetails;

namespace {

constexpr auto kLong = std::chrono::seconds(60);
constexpr const char* kText = "the big dog ran";
using Texts = std::vector<std::string>;

// Also what a refused call turns into where it should have been answered.
struct Failed : std::runtime_error {
  using std::runtime_error::runtime_error;
};

std::string shown(const Texts& texts) {
  std::string all;
  for (const auto& text : texts) all += (all.empty() ? "" : ",") + text;
  return all;
}

template <typename T>
std::string shown(const T& value) {
  std::ostringstream text;
  text << value;
  return text.str();
}

template <typename T>
void check(const std::string& what, const T& found, const T& expected) {
  if (!(found == expected)) throw Failed(what + " is " + shown(found) + ", not " + shown(expected));
}

void check(const std::string& what, const std::string& found, const char* expected) {
  check<std::string>(what, found, expected);
}

void need(bool holds, const std::string& what) {
  if (!holds) throw Failed(what);
}

void succeed(const grpc::Status& status) {
  if (!status.ok())
    throw Failed(modelyard::name_of(status.error_code()) + ": " + status.error_message());
}

void check_error(const ErrorDetails& found, grpc::StatusCode code, const char* reason) {
  check("code", modelyard::name_of(found.code), modelyard::name_of(code));
  check("reason", found.reason, reason);
  check("domain", found.domain, "modelyard");
}

Texts split(const std::string& text, char at) {
  Texts parts;
  std::istringstream in(text);
  for (std::string part; std::getline(in, part, at);) parts.push_back(part);
  return parts;
}

// A UUID, random: RFC 4122, version 4.
std::string new_id() {
  static std::random_device random;
  std::string id = "xxxxxxxx-xxxx-4xxx-axxx-xxxxxxxxxxxx";
  for (char& c : id) {
    if (c == 'x') c = "0123456789abcdef"[random() % 16];
  }
  return id;
}

v1::Tensor texts(const std::string& name, const Texts& values) {
  v1::Tensor tensor;
  tensor.set_name(name);
  tensor.set_data_type(v1::DATA_TYPE_TEXT);
  tensor.add_shape(static_cast<std::int64_t>(values.size()));
  for (const auto& value : values) tensor.mutable_text()->add_values(value);
  return tensor;
}

v1::Tensor floats(const std::vector<std::int64_t>& shape, const std::string& raw) {
  v1::Tensor tensor;
  tensor.set_name("x");
  tensor.set_data_type(v1::DATA_TYPE_FLOAT32);
  for (const auto dimension : shape) tensor.add_shape(dimension);
  tensor.set_raw(raw);
  return tensor;
}

// Little-endian, on machines of either order.
std::string little_endian(const std::vector<float>& values) {
  std::string raw;
  for (const float value : values) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof bits);
    for (int shift = 0; shift < 32; shift += 8)
      raw.push_back(static_cast<char>(bits >> shift & 0xff));
  }
  return raw;
}

float float_at(const std::string& raw, std::size_t at) {
  std::uint32_t bits = 0;
  for (std::size_t i = 0; i < 4; ++i)
    bits |= static_cast<std::uint32_t>(static_cast<unsigned char>(raw[at + i])) << 8 * i;
  float value = 0;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

Texts values_of(const v1::Tensor& tensor) {
  return {tensor.text().values().begin(), tensor.text().values().end()};
}

const v1::Tensor& only(const v1::PredictResponse& answer) {
  check("number of outputs", answer.outputs_size(), 1);
  return answer.outputs(0);
}

const v1::Tensor& output(const v1::PredictResponse& answer, const std::string& name) {
  for (const auto& tensor : answer.outputs()) {
    if (tensor.name() == name) return tensor;
  }
  throw Failed("there is no output " + name);
}

class Scenario {
 public:
  Scenario(std::map<std::string, std::string> words, Texts steps)
      : words_(std::move(words)),
        steps_(std::move(steps)),
        prefix_(word("prefix")),
        connection_(word("target")) {}

  void create_models() {
    const auto request_id = new_id();
    v1::Model echo;
    echo.set_runtime("identity");
    echo.add_keys(key("echo"));
    const auto first = created("echo", echo, request_id);
    check("etag of the replay", created("echo", echo, request_id).etag(), first.etag());

    const auto text =
        created("text", text_model("text", "text-classification", "folder"), new_id());
    need(text.estimated_bytes() > 0, "estimated_bytes of the classifier is 0");
    v1::GetModelRequest request;
    request.set_name(model("text"));
    v1::GetModelResponse got;
    Call call;
    succeed(connection_.models->GetModel(&call, request, &got));
    check("etag of GetModel", got.model().etag(), text.etag());
  }

  void create_route() {
    v1::CreateRouteRequest request;
    request.set_route_id(prefix_ + "-split");
    request.set_request_id(new_id());
    request.mutable_route()->add_keys(key("split"));
    auto& split = *request.mutable_route()->mutable_split();
    split.set_salt("scenario");
    add_branch(split, "blue", model("echo"), 3);
    add_branch(split, "green", model("text"), 1);
    v1::CreateRouteResponse answer;
    Call call;
    succeed(connection_.routes->CreateRoute(&call, request, &answer));
    check("name of the route", answer.route().name(), route_name());
    Texts branches;
    for (const auto& branch : answer.route().split().branches()) {
      branches.push_back(branch.name() + " " + branch.target() + " " +
                         std::to_string(branch.weight()));
    }
    check("branches of the route", branches,
          Texts{"blue " + model("echo") + " 3", "green " + model("text") + " 1"});
  }

  void load() {
    Call watching;
    const auto watch = connection_.admin->WatchEvents(&watching, v1::WatchEventsRequest());
    v1::WatchEventsResponse first;
    if (!watch->Read(&first)) succeed(watch->Finish());
    watching.cancel();
    watch->Finish();
    epoch_ = first.epoch();
    revision_ = first.revision();

    v1::LoadModelRequest request;
    request.set_model(model("text"));
    v1::LoadModelResponse answer;
    Call call;
    succeed(connection_.residencies->LoadModel(&call, request, &answer));
    check("model of the residency", answer.residency().model(), model("text"));
  }

  void watch() {
    const auto loaded = load_done();
    need(loaded.size_bytes() + loaded.shared_bytes() > 0, "the loaded model holds 0 bytes");

    Call call;
    const auto watch =
        connection_.residencies->WatchResidencies(&call, v1::WatchResidenciesRequest());
    auto state = v1::RESIDENCY_STATE_UNSPECIFIED;
    v1::WatchResidenciesResponse message;
    do {
      if (!watch->Read(&message)) succeed(watch->Finish());
      for (const auto& residency : message.residencies()) {
        if (residency.model() == model("text")) state = residency.state();
      }
    } while (!message.snapshot_complete());
    call.cancel();
    watch->Finish();
    check("state of the classifier", state, v1::RESIDENCY_STATE_RESIDENT);
  }

  void predict() {
    const auto raw = little_endian({0.5F, -1.25F, 3.0F, 1e-3F, 65504.0F, -0.0F});
    auto answer = ask(key("echo"), floats({2, 3}, raw));
    const auto& echoed = only(answer);
    check("type of the echo", echoed.data_type(), v1::DATA_TYPE_FLOAT32);
    need(echoed.shape_size() == 2 && echoed.shape(0) == 2 && echoed.shape(1) == 3,
         "the echo has another shape");
    need(echoed.raw() == raw, "the echo has other bytes");
    check("served.model", answer.served().model(), model("echo"));

    const Texts words{"naïve", "日本語"};
    answer = ask(prefix_ + "-echo", texts("x", words));
    check("echoed texts", values_of(only(answer)), words);

    answer = ask(key("text"), texts("text", {kText, "you hate this small cat"}));
    check("labels", values_of(output(answer, "label")), labels());
    const auto& score = output(answer, "score");
    check("type of the scores", score.data_type(), v1::DATA_TYPE_FLOAT32);
    need(score.shape_size() == 1 && score.shape(0) == 2, "the scores have another shape");
    check<std::size_t>("bytes of the scores", score.raw().size(), 8);
    for (const std::size_t at : {0, 4}) {
      const float value = float_at(score.raw(), at);
      need(value > 0 && value <= 1, "a score is " + std::to_string(value));
    }
    check("served.model", answer.served().model(), model("text"));
    check("served.cold", answer.served().cold(), false);
    need(answer.served().has_run_duration(), "served.run_duration is not set");
  }

  void route() {
    std::ifstream file(word("branches"));
    need(file.is_open(), "the list of branches cannot be read");
    std::set<std::string> met;
    for (std::string line; std::getline(file, line);) {
      const auto parts = split(line, '\t');
      need(parts.size() == 2, "not a line of two parts: " + line);
      const auto& branch = parts[1];
      const auto answer = ask(key("split"), texts("text", {kText}), parts[0]);
      check("served.route", answer.served().route(), route_name());
      check("branch of " + parts[0], answer.served().branch(), branch);
      check("model of " + parts[0], answer.served().model(),
            model(branch == "blue" ? "echo" : "text"));
      if (branch == "blue") check("echoed text", values_of(only(answer)), Texts{kText});
      met.insert(branch);
    }
    need(met == std::set<std::string>{"blue", "green"}, "not both of the branches have occurred");
  }

  void stream() {
    Call call(kLong);
    const auto stream = connection_.inference->PredictStream(&call);
    for (std::int64_t first = 1000; first < 1016; first += 4) {
      v1::PredictStreamRequest message;
      for (std::int64_t id = first; id < first + 4; ++id) add_item(message, id);
      if (!stream->Write(message)) succeed(stream->Finish());
    }
    stream->WritesDone();
    std::map<std::int64_t, v1::PredictStreamResult> results;
    for (v1::PredictStreamResponse message; stream->Read(&message);) {
      for (const auto& result : message.results()) {
        need(results.emplace(result.id(), result).second,
             std::to_string(result.id()) + " is answered twice");
      }
    }
    succeed(stream->Finish());
    check<std::size_t>("number of answers", results.size(), 16);
    for (std::int64_t id = 1000; id < 1016; ++id) check_result(id, results[id]);
  }

  void generate() {
    created("generate", text_model("generate", "text-generation", "generation_folder"), new_id());
    const auto text = generated();
    check("second text", generated(), text);
  }

  void errors() {
    auto found = refused(key("nobody"), texts("x", {"x"}));
    check_error(found, grpc::StatusCode::NOT_FOUND, "KEY_NOT_FOUND");
    check("resource_name", found.resource, key("nobody"));

    found = refused(key("echo"), floats({2}, std::string(4, '\0')));
    check_error(found, grpc::StatusCode::INVALID_ARGUMENT, "INVALID_TENSOR");
    check("field", found.violations.empty() ? "" : found.violations[0].first,
          std::string("inputs[0]"));

    v1::Model echo;
    echo.set_runtime("identity");
    echo.add_keys(key("echo"));
    v1::Model unused;
    found = modelyard::details_of(create("echo", echo, new_id(), unused));
    check_error(found, grpc::StatusCode::ALREADY_EXISTS, "ALREADY_EXISTS");

    found = refused(key("/.."), texts("x", {"x"}));
    check_error(found, grpc::StatusCode::INVALID_ARGUMENT, "INVALID_FIELD");
    check("field", found.violations.empty() ? "" : found.violations[0].first, std::string("key"));
  }

  void remove() {
    if (std::count(steps_.begin(), steps_.end(), "create-route") > 0) {
      v1::DeleteRouteRequest request;
      request.set_name(route_name());
      request.set_request_id(new_id());
      v1::DeleteRouteResponse nothing;
      Call call;
      succeed(connection_.routes->DeleteRoute(&call, request, &nothing));
    }
    for (; !made_.empty(); made_.erase(made_.begin())) {
      v1::DeleteModelRequest request;
      request.set_name(model(*made_.begin()));
      request.set_request_id(new_id());
      v1::DeleteModelResponse nothing;
      Call call;
      succeed(connection_.models->DeleteModel(&call, request, &nothing));
    }
    check_error(refused(key("echo"), texts("x", {"x"})), grpc::StatusCode::NOT_FOUND,
                "KEY_NOT_FOUND");
    v1::GetModelRequest request;
    request.set_name(model("text"));
    v1::GetModelResponse got;
    Call call;
    const auto status = connection_.models->GetModel(&call, request, &got);
    check_error(modelyard::details_of(status), grpc::StatusCode::NOT_FOUND, "MODEL_NOT_FOUND");
  }

 private:
  std::string word(const std::string& name) const {
    const auto found = words_.find(name);
    if (found == words_.end()) throw Failed("no " + name + "= was given");
    return found->second;
  }
  std::string key(const std::string& name) const { return prefix_ + "/" + name; }
  std::string model(const std::string& name) const { return "models/" + prefix_ + "-" + name; }
  std::string route_name() const { return "routes/" + prefix_ + "-split"; }
  Texts labels() const { return split(word("labels"), ','); }

  v1::Model text_model(const std::string& name, const char* task, const char* folder) const {
    v1::Model text;
    text.set_runtime("transformers");
    text.set_task(task);
    text.mutable_source()->set_root(word("root"));
    text.mutable_source()->set_folder(word(folder));
    text.add_keys(key(name));
    return text;
  }

  static void add_branch(v1::SplitTarget& split, const char* name, const std::string& target,
                         std::int64_t weight) {
    auto& branch = *split.add_branches();
    branch.set_name(name);
    branch.set_target(target);
    branch.set_weight(weight);
  }

  grpc::Status create(const std::string& name, const v1::Model& model,
                      const std::string& request_id, v1::Model& created) {
    v1::CreateModelRequest request;
    request.set_model_id(prefix_ + "-" + name);
    *request.mutable_model() = model;
    request.set_request_id(request_id);
    v1::CreateModelResponse answer;
    Call call;
    auto status = connection_.models->CreateModel(&call, request, &answer);
    created = answer.model();
    return status;
  }

  v1::Model created(const std::string& name, const v1::Model& asked,
                    const std::string& request_id) {
    v1::Model created;
    succeed(create(name, asked, request_id, created));
    made_.insert(name);
    check("name of the model", created.name(), model(name));
    check("keys of the model", Texts(created.keys().begin(), created.keys().end()),
          Texts(asked.keys().begin(), asked.keys().end()));
    check("owner of the model", created.owner(), v1::MODEL_OWNER_API);
    return created;
  }

  v1::Event load_done() {
    v1::WatchEventsRequest request;
    request.set_epoch(epoch_);
    request.set_revision(revision_);
    Call call(kLong);
    const auto watch = connection_.admin->WatchEvents(&call, request);
    auto revision = revision_;
    for (v1::WatchEventsResponse message; watch->Read(&message);) {
      for (const auto& event : message.events()) {
        need(event.revision() > revision, "a revision comes behind a later one");
        revision = event.revision();
        if (event.type() == v1::EVENT_TYPE_LOAD_DONE && event.subject() == model("text")) {
          call.cancel();
          watch->Finish();
          return event;
        }
      }
    }
    succeed(watch->Finish());
    throw Failed("the watch ended before the load");
  }

  grpc::Status try_ask(const std::string& key, const v1::Tensor& tensor,
                       const std::string& affinity, v1::PredictResponse& answer) {
    v1::PredictRequest request;
    request.set_key(key);
    *request.add_inputs() = tensor;
    request.set_affinity(affinity);
    Call call;
    return connection_.inference->Predict(&call, request, &answer);
  }

  v1::PredictResponse ask(const std::string& key, const v1::Tensor& tensor,
                          const std::string& affinity = "") {
    v1::PredictResponse answer;
    succeed(try_ask(key, tensor, affinity, answer));
    return answer;
  }

  ErrorDetails refused(const std::string& key, const v1::Tensor& tensor) {
    v1::PredictResponse answer;
    return modelyard::details_of(try_ask(key, tensor, "", answer));
  }

  void add_item(v1::PredictStreamRequest& message, std::int64_t id) const {
    auto& item = *message.add_items();
    item.set_id(id);
    const bool echoes = id % 2 == 0;
    item.mutable_request()->set_key(key(id == 1015 ? "nobody" : echoes ? "echo" : "text"));
    *item.mutable_request()->add_inputs() =
        echoes ? texts("x", {"item " + std::to_string(id)}) : texts("text", {kText});
  }

  void check_result(std::int64_t id, const v1::PredictStreamResult& result) const {
    const auto what = "answer of " + std::to_string(id);
    if (id == 1015) {
      check("code of 1015", result.error().code(), static_cast<int>(grpc::StatusCode::NOT_FOUND));
      check("reason of 1015", result.error().reason(), v1::ERROR_REASON_KEY_NOT_FOUND);
    } else if (!result.has_response()) {
      throw Failed(what + " is " + result.ShortDebugString());
    } else if (id % 2 == 0) {
      check(what, values_of(only(result.response())), Texts{"item " + std::to_string(id)});
    } else {
      check(what, values_of(output(result.response(), "label")), Texts{labels().front()});
    }
  }

  std::string generated() {
    v1::GenerateRequest request;
    request.set_key(key("generate"));
    request.set_prompt("the cat sat");
    request.set_max_new_tokens(5);
    Call call(kLong);
    const auto stream = connection_.inference->Generate(&call, request);
    std::string text;
    Texts tokens;
    v1::GenerateResponse last;
    for (v1::GenerateResponse message; stream->Read(&message);) {
      need(last.finish() == v1::FINISH_REASON_UNSPECIFIED, "a message comes behind the last one");
      text += message.text();
      for (const auto token : message.token_ids()) tokens.push_back(std::to_string(token));
      last = message;
    }
    succeed(stream->Finish());
    check("tokens", tokens, split(word("tokens"), ','));
    check("finish", last.finish(), v1::FINISH_REASON_LENGTH);
    check("token_count", last.token_count(), 5);
    check("served.model", last.served().model(), model("generate"));
    return text;
  }

  std::map<std::string, std::string> words_;
  Texts steps_;
  std::string prefix_;
  modelyard::Connection connection_;
  std::set<std::string> made_;
  std::string epoch_;
  std::int64_t revision_ = 0;
};

const std::vector<std::pair<std::string, void (Scenario::*)()>> kSteps{
    {"create-models", &Scenario::create_models},
    {"create-route", &Scenario::create_route},
    {"load", &Scenario::load},
    {"watch", &Scenario::watch},
    {"predict", &Scenario::predict},
    {"route", &Scenario::route},
    {"stream", &Scenario::stream},
    {"generate", &Scenario::generate},
    {"errors", &Scenario::errors},
    {"delete", &Scenario::remove},
};

int run(std::map<std::string, std::string> words) {
  Texts asked = split(words["steps"], ',');
  if (asked.empty()) {
    for (const auto& step : kSteps) asked.push_back(step.first);
  }
  const std::map<std::string, void (Scenario::*)()> known(kSteps.begin(), kSteps.end());
  for (const auto& step : asked) {
    if (known.count(step) == 0) {
      std::cerr << "no such step: " << step << '\n';
      return 2;
    }
  }
  if (words["target"].empty() || words["prefix"].empty()) {
    std::cerr << "target= and prefix= are needed\n";
    return 2;
  }
  Scenario scenario(std::move(words), asked);
  int exit = 0;
  for (const auto& step : asked) {
    try {
      (scenario.*known.at(step))();
      std::cout << "ok " << step << std::endl;
    } catch (const std::exception& error) {
      exit = 1;
      std::string why = error.what();
      std::replace(why.begin(), why.end(), '\n', ' ');
      std::cout << "not ok " << step << ": " << why << std::endl;
    }
  }
  return exit;
}

}  // namespace

int main(int argc, char** argv) {
  std::map<std::string, std::string> words;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const auto at = argument.find('=');
    if (at != std::string::npos) words[argument.substr(0, at)] = argument.substr(at + 1);
  }
  return run(std::move(words));
}
