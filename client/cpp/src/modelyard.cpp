#include "modelyard.hpp"

#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"

namespace modelyard {
namespace {

constexpr int kMaxMessageBytes = 64 << 20;

// Predictions are idempotent: gRPC itself repeats them, and waits as long as the server says.
constexpr const char* kServiceConfig = R"({
  "loadBalancingConfig": [{"round_robin": {}}],
  "methodConfig": [{
    "name": [{"service": "modelyard.v1.InferenceService"}],
    "retryPolicy": {
      "maxAttempts": 4, "initialBackoff": "0.05s", "maxBackoff": "1s", "backoffMultiplier": 2,
      "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"]
    }
  }],
  "retryThrottling": {"maxTokens": 100, "tokenRatio": 0.1}
})";

std::shared_ptr<grpc::Channel> channel_to(
    const std::string& target, const std::shared_ptr<grpc::ChannelCredentials>& credentials) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(kMaxMessageBytes);
  arguments.SetMaxSendMessageSize(kMaxMessageBytes);
  arguments.SetServiceConfigJSON(kServiceConfig);
  return grpc::CreateCustomChannel(target, credentials, arguments);
}

}  // namespace

Connection::Connection(const std::string& target,
                       const std::shared_ptr<grpc::ChannelCredentials>& credentials) {
  const auto channel = channel_to(target, credentials);
  inference = v1::InferenceService::NewStub(channel);
  models = v1::ModelService::NewStub(channel);
  routes = v1::RouteService::NewStub(channel);
  residencies = v1::ResidencyService::NewStub(channel);
  admin = v1::AdminService::NewStub(channel);
}

ErrorDetails details_of(const grpc::Status& status) {
  ErrorDetails found;
  found.code = status.error_code();
  google::rpc::Status packed;
  if (!packed.ParseFromString(status.error_details())) return found;
  for (const auto& detail : packed.details()) {
    if (google::rpc::ErrorInfo info;
        detail.Is<google::rpc::ErrorInfo>() && detail.UnpackTo(&info)) {
      found.reason = info.reason();
      found.domain = info.domain();
      found.metadata = {info.metadata().begin(), info.metadata().end()};
    } else if (google::rpc::BadRequest bad;
               detail.Is<google::rpc::BadRequest>() && detail.UnpackTo(&bad)) {
      for (const auto& violation : bad.field_violations()) {
        found.violations.emplace_back(violation.field(), violation.description());
      }
    } else if (google::rpc::ResourceInfo resource;
               detail.Is<google::rpc::ResourceInfo>() && detail.UnpackTo(&resource)) {
      found.resource = resource.resource_name();
    } else if (google::rpc::RetryInfo retry;
               detail.Is<google::rpc::RetryInfo>() && detail.UnpackTo(&retry)) {
      const auto& delay = retry.retry_delay();
      found.retry_after =
          std::chrono::milliseconds(delay.seconds() * 1000 + delay.nanos() / 1'000'000);
    }
  }
  return found;
}

std::string name_of(grpc::StatusCode code) {
  constexpr const char* names[] = {"OK",
                                   "CANCELLED",
                                   "UNKNOWN",
                                   "INVALID_ARGUMENT",
                                   "DEADLINE_EXCEEDED",
                                   "NOT_FOUND",
                                   "ALREADY_EXISTS",
                                   "PERMISSION_DENIED",
                                   "RESOURCE_EXHAUSTED",
                                   "FAILED_PRECONDITION",
                                   "ABORTED",
                                   "OUT_OF_RANGE",
                                   "UNIMPLEMENTED",
                                   "INTERNAL",
                                   "UNAVAILABLE",
                                   "DATA_LOSS",
                                   "UNAUTHENTICATED"};
  const auto number = static_cast<std::size_t>(code);
  return number < std::size(names) ? names[number] : std::to_string(number);
}

}  // namespace modelyard
