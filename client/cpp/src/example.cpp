// Asks a key about a text: example 127.0.0.1:8470 acme/reviews "Kept me dry all week."

#include <iostream>

#include "modelyard.hpp"

namespace v1 = modelyard::v1;

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: example HOST:PORT KEY TEXT\n";
    return 2;
  }
  const modelyard::Connection connection(argv[1]);
  v1::PredictRequest request;
  request.set_key(argv[2]);
  auto& input = *request.add_inputs();
  input.set_data_type(v1::DATA_TYPE_TEXT);
  input.add_shape(1);
  input.mutable_text()->add_values(argv[3]);

  modelyard::Call call;
  v1::PredictResponse answer;
  if (const auto status = connection.inference->Predict(&call, request, &answer); !status.ok()) {
    const auto details = modelyard::details_of(status);
    std::cerr << modelyard::name_of(details.code) << ' ' << details.reason << ": "
              << status.error_message() << '\n';
    for (const auto& [field, description] : details.violations)
      std::cerr << "  " << field << ": " << description << '\n';
    return 1;
  }
  for (const auto& output : answer.outputs()) {
    for (const auto& value : output.text().values())
      std::cout << output.name() << ' ' << value << '\n';
  }
  std::cout << "served by " << answer.served().model() << " on " << answer.served().device()
            << '\n';
}
