// A connection to modelyard: its stubs on one channel, deadlines, retries, and what errors say.

import {
  ChannelCredentials,
  Client,
  credentials,
  Metadata,
  status,
  type ClientDuplexStream,
  type ClientReadableStream,
  type ClientUnaryCall,
  type ServiceError,
} from "@grpc/grpc-js";
import { BadRequest, ErrorInfo, ResourceInfo, RetryInfo } from "./gen/google/rpc/error_details.js";
import { Status } from "./gen/google/rpc/status.js";
import { AdminServiceClient } from "./gen/modelyard/v1/admin_service.js";
import { InferenceServiceClient } from "./gen/modelyard/v1/inference_service.js";
import { ModelServiceClient } from "./gen/modelyard/v1/model_service.js";
import { ResidencyServiceClient } from "./gen/modelyard/v1/residency_service.js";
import { RouteServiceClient } from "./gen/modelyard/v1/route_service.js";

/** Milliseconds that a call has unless it is given others. */
export const DEADLINE_MS = 30_000;

const MAX_MESSAGE_BYTES = 64 * 1024 * 1024;

// Predictions are idempotent: gRPC itself repeats them, and waits as long as the server says.
const SERVICE_CONFIG = {
  loadBalancingConfig: [{ round_robin: {} }],
  methodConfig: [
    {
      name: [{ service: "modelyard.v1.InferenceService" }],
      retryPolicy: {
        maxAttempts: 4,
        initialBackoff: "0.05s",
        maxBackoff: "1s",
        backoffMultiplier: 2,
        retryableStatusCodes: ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
      },
    },
  ],
  retryThrottling: { maxTokens: 100, tokenRatio: 0.1 },
};

/** The services of one server, on one channel. */
export class Connection {
  readonly inference: InferenceServiceClient;
  readonly models: ModelServiceClient;
  readonly routes: RouteServiceClient;
  readonly residencies: ResidencyServiceClient;
  readonly admin: AdminServiceClient;
  readonly #channel: Client;

  /**
   * @param target address of the server, "host:port"
   * @param channelCredentials how the channel is secured; in clear by default
   */
  constructor(target: string, channelCredentials: ChannelCredentials = credentials.createInsecure()) {
    this.#channel = new Client(target, channelCredentials, {
      "grpc.max_receive_message_length": MAX_MESSAGE_BYTES,
      "grpc.max_send_message_length": MAX_MESSAGE_BYTES,
      "grpc.service_config": JSON.stringify(SERVICE_CONFIG),
    });
    const shared = { channelOverride: this.#channel.getChannel() };
    this.inference = new InferenceServiceClient(target, channelCredentials, shared);
    this.models = new ModelServiceClient(target, channelCredentials, shared);
    this.routes = new RouteServiceClient(target, channelCredentials, shared);
    this.residencies = new ResidencyServiceClient(target, channelCredentials, shared);
    this.admin = new AdminServiceClient(target, channelCredentials, shared);
  }

  /** Closes the channel; calls under way end with an error. */
  close(): void {
    this.#channel.close();
  }
}

/** The options of a call that must end within a time. */
export function within(milliseconds: number = DEADLINE_MS): { deadline: number } {
  return { deadline: Date.now() + milliseconds };
}

type Unary<Request, Response> = (
  request: Request,
  metadata: Metadata,
  options: { deadline: number },
  callback: (error: ServiceError | null, response: Response) => void,
) => ClientUnaryCall;

/**
 * Makes a unary call and returns a promise of its answer.
 *
 * @param client the stub, for instance `connection.inference`
 * @param method its method, for instance `connection.inference.predict`
 */
export function call<Request, Response>(
  client: Client,
  method: Unary<Request, Response>,
  request: Request,
  milliseconds: number = DEADLINE_MS,
): Promise<Response> {
  return new Promise((resolve, reject) => {
    method.call(client, request, new Metadata(), within(milliseconds), (error, response) =>
      error ? reject(error) : resolve(response),
    );
  });
}

/** Cancels a streaming call whose end nobody waits for. */
export function cancel(
  stream: ClientReadableStream<unknown> | ClientDuplexStream<never, unknown>,
): void {
  stream.on("error", () => {}); // it ends with CANCELLED, as it was told to
  stream.cancel();
}

/** What a failed call says in its status and the details of it. */
export interface ErrorDetails {
  /** The status code. */
  code: status;
  /** Name of the reason, see modelyard.v1.ErrorReason; empty if the answer came from somebody else. */
  reason: string;
  /** "modelyard" for errors of the server. */
  domain: string;
  /** What varies in the text. */
  metadata: { [name: string]: string };
  /** The fields that are wrong, and how. */
  violations: { field: string; description: string }[];
  /** What was not found, or is taken; empty where that is not the reason. */
  resource: string;
  /** Milliseconds after which a retry can help; undefined if none can. */
  retryAfterMs: number | undefined;
}

/** Reads the details of a failed call. Throws whatever is no error of gRPC. */
export function errorDetails(error: unknown): ErrorDetails {
  if (!(error instanceof Error && "code" in error && "metadata" in error)) throw error;
  const failed = error as ServiceError;
  const found: ErrorDetails = {
    code: failed.code,
    reason: "",
    domain: "",
    metadata: {},
    violations: [],
    resource: "",
    retryAfterMs: undefined,
  };
  const packed = failed.metadata?.get("grpc-status-details-bin")[0];
  if (!(packed instanceof Buffer)) return found;
  for (const { typeUrl, value } of Status.decode(packed).details) {
    switch (typeUrl.slice(typeUrl.lastIndexOf("/") + 1)) {
      case "google.rpc.ErrorInfo": {
        const info = ErrorInfo.decode(value);
        found.reason = info.reason;
        found.domain = info.domain;
        found.metadata = info.metadata;
        break;
      }
      case "google.rpc.BadRequest":
        found.violations = BadRequest.decode(value).fieldViolations;
        break;
      case "google.rpc.ResourceInfo":
        found.resource = ResourceInfo.decode(value).resourceName;
        break;
      case "google.rpc.RetryInfo": {
        const delay = RetryInfo.decode(value).retryDelay;
        if (delay) found.retryAfterMs = Number(delay.seconds) * 1000 + delay.nanos / 1e6;
        break;
      }
    }
  }
  return found;
}
