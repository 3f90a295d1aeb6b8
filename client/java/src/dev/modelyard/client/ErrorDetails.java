package dev.modelyard.client;

import com.google.protobuf.Any;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.rpc.BadRequest;
import com.google.rpc.ErrorInfo;
import com.google.rpc.ResourceInfo;
import com.google.rpc.RetryInfo;
import io.grpc.Status;
import io.grpc.protobuf.StatusProto;
import java.time.Duration;
import java.util.List;
import java.util.Map;
import java.util.Optional;

/** What a failed call says in its status and the details of it. */
public final class ErrorDetails {
  private final Status.Code code;
  private ErrorInfo info = ErrorInfo.getDefaultInstance();
  private BadRequest badRequest = BadRequest.getDefaultInstance();
  private ResourceInfo resource = ResourceInfo.getDefaultInstance();
  private Duration retryAfter;

  private ErrorDetails(Status.Code code) {
    this.code = code;
  }

  /** Reads the details of what a call has thrown. */
  public static ErrorDetails of(Throwable error) {
    ErrorDetails found = new ErrorDetails(Status.fromThrowable(error).getCode());
    com.google.rpc.Status packed = StatusProto.fromThrowable(error);
    if (packed == null) {
      return found;
    }
    try {
      for (Any detail : packed.getDetailsList()) {
        found.read(detail);
      }
    } catch (InvalidProtocolBufferException e) {
      throw new IllegalArgumentException("the details of the status cannot be read", e);
    }
    return found;
  }

  private void read(Any detail) throws InvalidProtocolBufferException {
    if (detail.is(ErrorInfo.class)) {
      info = detail.unpack(ErrorInfo.class);
    } else if (detail.is(BadRequest.class)) {
      badRequest = detail.unpack(BadRequest.class);
    } else if (detail.is(ResourceInfo.class)) {
      resource = detail.unpack(ResourceInfo.class);
    } else if (detail.is(RetryInfo.class)) {
      com.google.protobuf.Duration delay = detail.unpack(RetryInfo.class).getRetryDelay();
      retryAfter = Duration.ofSeconds(delay.getSeconds(), delay.getNanos());
    }
  }

  /** The status code. */
  public Status.Code code() {
    return code;
  }

  /** Name of a dev.modelyard.v1.ErrorReason; empty if the answer came from somebody else. */
  public String reason() {
    return info.getReason();
  }

  /** "modelyard" for errors of the server. */
  public String domain() {
    return info.getDomain();
  }

  /** What varies in the text. */
  public Map<String, String> metadata() {
    return info.getMetadataMap();
  }

  /** The fields that are wrong, and how. */
  public List<BadRequest.FieldViolation> violations() {
    return badRequest.getFieldViolationsList();
  }

  /** What was not found, or is taken; empty where that is not the reason. */
  public String resource() {
    return resource.getResourceName();
  }

  /** After what time a retry can help; empty if none can. */
  public Optional<Duration> retryAfter() {
    return Optional.ofNullable(retryAfter);
  }
}
