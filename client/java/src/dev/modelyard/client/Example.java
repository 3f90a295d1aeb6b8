package dev.modelyard.client;

import dev.modelyard.v1.DataType;
import dev.modelyard.v1.PredictRequest;
import dev.modelyard.v1.PredictResponse;
import dev.modelyard.v1.Tensor;
import dev.modelyard.v1.TextElements;
import io.grpc.StatusRuntimeException;

/** Asks a key about a text: example 127.0.0.1:8470 acme/reviews "Kept me dry all week." */
public final class Example {
  private Example() {}

  public static void main(String[] args) {
    if (args.length != 3) {
      System.err.println("usage: example HOST:PORT KEY TEXT");
      System.exit(2);
    }
    PredictRequest request =
        PredictRequest.newBuilder()
            .setKey(args[1])
            .addInputs(
                Tensor.newBuilder()
                    .setDataType(DataType.DATA_TYPE_TEXT)
                    .addShape(1)
                    .setText(TextElements.newBuilder().addValues(args[2])))
            .build();
    try (Connection connection = new Connection(args[0])) {
      PredictResponse answer = connection.inference().predict(request);
      for (Tensor output : answer.getOutputsList()) {
        if (output.hasText()) {
          System.out.println(output.getName() + " " + output.getText().getValuesList());
        }
      }
      System.out.printf(
          "served by %s on %s%n", answer.getServed().getModel(), answer.getServed().getDevice());
    } catch (StatusRuntimeException e) {
      ErrorDetails details = ErrorDetails.of(e);
      System.err.printf("%s %s: %s%n", details.code(), details.reason(), e.getMessage());
      details.violations().forEach(v -> System.err.println(v.getField() + ": " + v.getDescription()));
      System.exit(1);
    }
  }
}
