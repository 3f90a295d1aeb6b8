// A connection to modelyard: its stubs on one channel, deadlines, retries, and what errors say.
#pragma once

#include <grpcpp/grpcpp.h>

#include <chrono>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "modelyard/v1/admin_service.grpc.pb.h"
#include "modelyard/v1/inference_service.grpc.pb.h"
#include "modelyard/v1/model_service.grpc.pb.h"
#include "modelyard/v1/residency_service.grpc.pb.h"
#include "modelyard/v1/route_service.grpc.pb.h"

namespace modelyard {

// The services of one server, on one channel, which is closed with the last of them. Its stubs may
// be used by several threads at once.
struct Connection {
  // `target` is "host:port".
  explicit Connection(const std::string& target,
                      const std::shared_ptr<grpc::ChannelCredentials>& credentials =
                          grpc::InsecureChannelCredentials());

  std::unique_ptr<v1::InferenceService::Stub> inference;
  std::unique_ptr<v1::ModelService::Stub> models;
  std::unique_ptr<v1::RouteService::Stub> routes;
  std::unique_ptr<v1::ResidencyService::Stub> residencies;
  std::unique_ptr<v1::AdminService::Stub> admin;
};

// What a call is made with: a context whose deadline is so long from now. One call each.
class Call {
 public:
  explicit Call(std::chrono::milliseconds time = std::chrono::seconds(30)) {
    context_.set_deadline(std::chrono::system_clock::now() + time);
  }
  // For the stubs, which want a pointer.
  grpc::ClientContext* operator&() { return &context_; }
  void cancel() { context_.TryCancel(); }

 private:
  grpc::ClientContext context_;
};

// What a failed call says in its status and the details of it.
struct ErrorDetails {
  grpc::StatusCode code = grpc::StatusCode::UNKNOWN;
  // Name of the reason, see modelyard::v1::ErrorReason; empty if the answer came from somebody
  // else.
  std::string reason;
  // "modelyard" for errors of the server.
  std::string domain;
  // What varies in the text.
  std::map<std::string, std::string> metadata;
  // The fields that are wrong, and how.
  std::vector<std::pair<std::string, std::string>> violations;
  // What was not found, or is taken; empty where that is not the reason.
  std::string resource;
  // After what time a retry can help; negative if none can.
  std::chrono::milliseconds retry_after{-1};
};

// Reads the details of a status that is not OK.
ErrorDetails details_of(const grpc::Status& status);

// The name of a status code, for instance "NOT_FOUND".
std::string name_of(grpc::StatusCode code);

}  // namespace modelyard
