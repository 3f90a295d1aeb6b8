package dev.modelyard.client;

import dev.modelyard.v1.AdminServiceGrpc;
import dev.modelyard.v1.AdminServiceGrpc.AdminServiceBlockingStub;
import dev.modelyard.v1.InferenceServiceGrpc;
import dev.modelyard.v1.InferenceServiceGrpc.InferenceServiceBlockingStub;
import dev.modelyard.v1.InferenceServiceGrpc.InferenceServiceStub;
import dev.modelyard.v1.ModelServiceGrpc;
import dev.modelyard.v1.ModelServiceGrpc.ModelServiceBlockingStub;
import dev.modelyard.v1.ResidencyServiceGrpc;
import dev.modelyard.v1.ResidencyServiceGrpc.ResidencyServiceBlockingStub;
import dev.modelyard.v1.RouteServiceGrpc;
import dev.modelyard.v1.RouteServiceGrpc.RouteServiceBlockingStub;
import io.grpc.ManagedChannel;
import io.grpc.ManagedChannelBuilder;
import java.time.Duration;
import java.util.List;
import java.util.Map;
import java.util.concurrent.TimeUnit;

/**
 * The services of one server, on one channel. May be used by several threads at once.
 *
 * <p>Each method returns a stub with a deadline that begins then: ask for one per call.
 */
public final class Connection implements AutoCloseable {
  /** What a call has unless it is given another. */
  public static final Duration DEADLINE = Duration.ofSeconds(30);

  private static final int MAX_MESSAGE_BYTES = 64 << 20;

  // Predictions are idempotent: gRPC itself repeats them, and waits as long as the server says.
  // Numbers have to be doubles.
  private static final Map<String, ?> SERVICE_CONFIG =
      Map.of(
          "methodConfig",
          List.of(
              Map.of(
                  "name",
                  List.of(Map.of("service", "modelyard.v1.InferenceService")),
                  "retryPolicy",
                  Map.of(
                      "maxAttempts", 4.0,
                      "initialBackoff", "0.05s",
                      "maxBackoff", "1s",
                      "backoffMultiplier", 2.0,
                      "retryableStatusCodes", List.of("UNAVAILABLE", "RESOURCE_EXHAUSTED")))),
          "retryThrottling",
          Map.of("maxTokens", 100.0, "tokenRatio", 0.1));

  private final ManagedChannel channel;

  /** Connects in clear to a target, "host:port". */
  public Connection(String target) {
    this(ManagedChannelBuilder.forTarget(target).usePlaintext());
  }

  /** Connects as the builder says, with the retries and limits of this class. */
  public Connection(ManagedChannelBuilder<?> builder) {
    channel =
        builder
            .enableRetry()
            .defaultServiceConfig(SERVICE_CONFIG)
            .defaultLoadBalancingPolicy("round_robin")
            .maxInboundMessageSize(MAX_MESSAGE_BYTES)
            .build();
  }

  /** Predictions, blocking. */
  public InferenceServiceBlockingStub inference() {
    return InferenceServiceGrpc.newBlockingStub(channel)
        .withDeadlineAfter(DEADLINE.toMillis(), TimeUnit.MILLISECONDS);
  }

  /** Predictions for observers, which streams need. Set a deadline: it has none. */
  public InferenceServiceStub inferenceAsync() {
    return InferenceServiceGrpc.newStub(channel);
  }

  /** Registration of models. */
  public ModelServiceBlockingStub models() {
    return ModelServiceGrpc.newBlockingStub(channel)
        .withDeadlineAfter(DEADLINE.toMillis(), TimeUnit.MILLISECONDS);
  }

  /** What keys mean. */
  public RouteServiceBlockingStub routes() {
    return RouteServiceGrpc.newBlockingStub(channel)
        .withDeadlineAfter(DEADLINE.toMillis(), TimeUnit.MILLISECONDS);
  }

  /** What is in memory. */
  public ResidencyServiceBlockingStub residencies() {
    return ResidencyServiceGrpc.newBlockingStub(channel)
        .withDeadlineAfter(DEADLINE.toMillis(), TimeUnit.MILLISECONDS);
  }

  /** The server itself. */
  public AdminServiceBlockingStub admin() {
    return AdminServiceGrpc.newBlockingStub(channel)
        .withDeadlineAfter(DEADLINE.toMillis(), TimeUnit.MILLISECONDS);
  }

  /** Closes the channel; calls under way end with an error. */
  @Override
  public void close() {
    channel.shutdownNow();
    try {
      channel.awaitTermination(5, TimeUnit.SECONDS);
    } catch (InterruptedException e) {
      Thread.currentThread().interrupt();
    }
  }
}
