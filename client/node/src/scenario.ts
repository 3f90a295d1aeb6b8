// The clients' scenario in TypeScript; client/SCENARIO.md says what each step is.

import { randomUUID } from "node:crypto";
import { readFileSync } from "node:fs";
import { isDeepStrictEqual } from "node:util";
import { status } from "@grpc/grpc-js";
import { WatchEventsRequest } from "./gen/modelyard/v1/admin_service.js";
import { ErrorReason } from "./gen/modelyard/v1/error_reason.js";
import { EventType } from "./gen/modelyard/v1/event.js";
import {
  FinishReason,
  GenerateRequest,
  PredictRequest,
  PredictStreamRequest,
  type PredictResponse,
  type PredictStreamResult,
} from "./gen/modelyard/v1/inference_service.js";
import { Model, ModelOwner } from "./gen/modelyard/v1/model.js";
import { CreateModelRequest } from "./gen/modelyard/v1/model_service.js";
import { ResidencyState } from "./gen/modelyard/v1/residency.js";
import { CreateRouteRequest, DeleteRouteRequest } from "./gen/modelyard/v1/route_service.js";
import { DataType, Tensor } from "./gen/modelyard/v1/tensor.js";
import { call, cancel, Connection, errorDetails, within, type ErrorDetails } from "./modelyard.js";

const LONG_MS = 60_000;
const TEXT = "the big dog ran";

class Failed extends Error {}

function check(found: unknown, expected: unknown, what: string): void {
  if (!isDeepStrictEqual(found, expected)) {
    throw new Failed(`${what} is ${shown(found)}, not ${shown(expected)}`);
  }
}

function need(holds: boolean, what: string): void {
  if (!holds) throw new Failed(what);
}

function shown(value: unknown): string {
  return JSON.stringify(value, (_, part) => (typeof part === "bigint" ? `${part}` : part)) ?? "unset";
}

function texts(name: string, values: string[]): Tensor {
  return Tensor.fromPartial({
    name,
    dataType: DataType.DATA_TYPE_TEXT,
    shape: [BigInt(values.length)],
    content: { $case: "text", value: { values } },
  });
}

function floats(shape: bigint[], raw: Buffer): Tensor {
  return Tensor.fromPartial({
    name: "x",
    dataType: DataType.DATA_TYPE_FLOAT32,
    shape,
    content: { $case: "raw", value: raw },
  });
}

function valuesOf(tensor: Tensor): string[] {
  if (tensor.content?.$case !== "text") throw new Failed(`${tensor.name} holds no text`);
  return tensor.content.value.values;
}

function only(answer: PredictResponse): Tensor {
  check(answer.outputs.length, 1, "number of outputs");
  return answer.outputs[0]!;
}

function output(answer: PredictResponse, name: string): Tensor {
  const found = answer.outputs.find((tensor) => tensor.name === name);
  if (!found) throw new Failed(`there is no output ${name}`);
  return found;
}

async function refused(call: Promise<unknown>): Promise<ErrorDetails> {
  try {
    await call;
  } catch (error) {
    return errorDetails(error);
  }
  throw new Failed("a call that must be refused was answered");
}

function checkError(found: ErrorDetails, code: status, reason: string): void {
  check([status[found.code], found.reason], [status[code], reason], "code and reason");
  check(found.domain, "modelyard", "domain");
}

class Scenario {
  readonly #connection: Connection;
  readonly #words: Map<string, string>;
  readonly #prefix: string;
  readonly #made: string[] = [];
  #epoch = "";
  #revision = 0n;

  constructor(connection: Connection, words: Map<string, string>) {
    this.#connection = connection;
    this.#words = words;
    this.#prefix = this.#word("prefix");
  }

  async createModels(): Promise<void> {
    const requestId = randomUUID();
    const echo = Model.fromPartial({ runtime: "identity", keys: [this.#key("echo")] });
    const first = await this.#create("echo", echo, requestId);
    const replay = await this.#create("echo", echo, requestId);
    check(replay.etag, first.etag, "etag of the replay");
    const text = await this.#create("text", {
      ...Model.fromPartial({ runtime: "transformers", task: "text-classification" }),
      source: { root: this.#word("root"), folder: this.#word("folder") },
      keys: [this.#key("text")],
    });
    need(text.estimatedBytes > 0n, "estimated_bytes of the classifier is 0");
    const { models } = this.#connection;
    const got = await call(models, models.getModel, { name: this.#model("text") });
    check(got.model?.etag, text.etag, "etag of GetModel");
  }

  async createRoute(): Promise<void> {
    const branches = [
      { name: "blue", target: this.#model("echo"), weight: 3n },
      { name: "green", target: this.#model("text"), weight: 1n },
    ];
    const { routes } = this.#connection;
    const { route } = await call(
      routes,
      routes.createRoute,
      CreateRouteRequest.fromPartial({
        routeId: `${this.#prefix}-split`,
        route: {
          keys: [this.#key("split")],
          target: { $case: "split", value: { branches, salt: "scenario" } },
        },
        requestId: randomUUID(),
      }),
    );
    check(route?.name, this.#route(), "name of the route");
    check(route?.target?.$case, "split", "kind of the route");
    if (route?.target?.$case === "split") {
      check(route.target.value.branches, branches, "branches of the route");
    }
  }

  async load(): Promise<void> {
    const { admin, residencies } = this.#connection;
    const watch = admin.watchEvents(WatchEventsRequest.fromPartial({}), within());
    for await (const { epoch, revision } of watch) {
      this.#epoch = epoch;
      this.#revision = revision;
      break;
    }
    cancel(watch);
    const { residency } = await call(residencies, residencies.loadModel, {
      model: this.#model("text"),
    });
    check(residency?.model, this.#model("text"), "model of the residency");
  }

  async watch(): Promise<void> {
    const { residencies } = this.#connection;
    const loaded = await this.#loadDone();
    need(loaded.sizeBytes + loaded.sharedBytes > 0n, "the loaded model holds 0 bytes");
    const watch = residencies.watchResidencies({ epoch: "", revision: 0n }, within());
    let state = ResidencyState.RESIDENCY_STATE_UNSPECIFIED;
    for await (const message of watch) {
      for (const residency of message.residencies) {
        if (residency.model === this.#model("text")) state = residency.state;
      }
      if (message.snapshotComplete) break;
    }
    cancel(watch);
    check(state, ResidencyState.RESIDENCY_STATE_RESIDENT, "state of the classifier");
  }

  async predict(): Promise<void> {
    const raw = Buffer.from(new Float32Array([0.5, -1.25, 3, 1e-3, 65504, -0.0]).buffer);
    let answer = await this.#predict(this.#key("echo"), floats([2n, 3n], raw));
    const echoed = only(answer);
    check(echoed.dataType, DataType.DATA_TYPE_FLOAT32, "type of the echo");
    check(echoed.shape, [2n, 3n], "shape of the echo");
    check(echoed.content, { $case: "raw", value: raw }, "bytes of the echo");
    check(answer.served?.model, this.#model("echo"), "served.model");

    const words = ["naïve", "日本語"];
    answer = await this.#predict(`${this.#prefix}-echo`, texts("x", words));
    check(valuesOf(only(answer)), words, "echoed texts");

    answer = await this.#predict(
      this.#key("text"),
      texts("text", [TEXT, "you hate this small cat"]),
    );
    check(valuesOf(output(answer, "label")), this.#labels(), "labels");
    const score = output(answer, "score");
    check(score.dataType, DataType.DATA_TYPE_FLOAT32, "type of the scores");
    check(score.shape, [2n], "shape of the scores");
    if (score.content?.$case !== "raw") throw new Failed("the scores are not raw");
    const bytes = score.content.value;
    check(bytes.length, 8, "bytes of the scores");
    for (const value of [bytes.readFloatLE(0), bytes.readFloatLE(4)]) {
      need(value > 0 && value <= 1, `a score is ${value}`);
    }
    check(answer.served?.model, this.#model("text"), "served.model");
    check(answer.served?.cold, false, "served.cold");
    need(answer.served?.runDuration !== undefined, "served.run_duration is not set");
  }

  async route(): Promise<void> {
    const models = new Map([
      ["blue", this.#model("echo")],
      ["green", this.#model("text")],
    ]);
    const met = new Set<string>();
    for (const line of readFileSync(this.#word("branches"), "utf8").split("\n")) {
      const [affinity, branch] = line.split("\t");
      if (!affinity || !branch) continue;
      const { served, ...answer } = await this.#predict(
        this.#key("split"),
        texts("text", [TEXT]),
        affinity,
      );
      check(served?.route, this.#route(), "served.route");
      check(served?.branch, branch, `branch of ${affinity}`);
      check(served?.model, models.get(branch), `model of ${affinity}`);
      if (branch === "blue") check(valuesOf(only({ ...answer, served })), [TEXT], "echoed text");
      met.add(branch);
    }
    check([...met].sort(), ["blue", "green"], "set of branches");
  }

  async stream(): Promise<void> {
    const ids = Array.from({ length: 16 }, (_, i) => 1000n + BigInt(i));
    const stream = this.#connection.inference.predictStream(within(LONG_MS));
    for (let at = 0; at < ids.length; at += 4) {
      const items = ids.slice(at, at + 4).map((id) => ({ id, request: this.#streamed(id) }));
      stream.write(PredictStreamRequest.fromPartial({ items }));
    }
    stream.end();
    const results = new Map<bigint, PredictStreamResult["result"]>();
    for await (const message of stream) {
      for (const { id, result } of message.results as PredictStreamResult[]) {
        need(!results.has(id), `${id} is answered twice`);
        results.set(id, result);
      }
    }
    check([...results.keys()].sort(), ids, "ids that were answered");
    for (const [id, result] of results) {
      if (id === 1015n) {
        if (result?.$case !== "error") throw new Failed(`${id} is no error`);
        check(result.value.code, status.NOT_FOUND, `code of ${id}`);
        check(result.value.reason, ErrorReason.ERROR_REASON_KEY_NOT_FOUND, `reason of ${id}`);
        continue;
      }
      if (result?.$case !== "response") throw new Failed(`${id} is no answer: ${shown(result)}`);
      if (id % 2n === 0n) {
        check(valuesOf(only(result.value)), [`item ${id}`], `answer of ${id}`);
      } else {
        const labels = valuesOf(output(result.value, "label"));
        check(labels, this.#labels().slice(0, 1), `answer of ${id}`);
      }
    }
  }

  async generate(): Promise<void> {
    await this.#create("generate", {
      ...Model.fromPartial({ runtime: "transformers", task: "text-generation" }),
      source: { root: this.#word("root"), folder: this.#word("generation_folder") },
      keys: [this.#key("generate")],
    });
    const text = await this.#generated();
    check(await this.#generated(), text, "second text");
  }

  async errors(): Promise<void> {
    let found = await refused(this.#predict(this.#key("nobody"), texts("x", ["x"])));
    checkError(found, status.NOT_FOUND, "KEY_NOT_FOUND");
    check(found.resource, this.#key("nobody"), "resource_name");

    found = await refused(this.#predict(this.#key("echo"), floats([2n], Buffer.alloc(4))));
    checkError(found, status.INVALID_ARGUMENT, "INVALID_TENSOR");
    check(found.violations[0]?.field, "inputs[0]", "field");

    const echo = Model.fromPartial({ runtime: "identity", keys: [this.#key("echo")] });
    found = await refused(this.#create("echo", echo));
    checkError(found, status.ALREADY_EXISTS, "ALREADY_EXISTS");

    found = await refused(this.#predict(this.#key("/.."), texts("x", ["x"])));
    checkError(found, status.INVALID_ARGUMENT, "INVALID_FIELD");
    check(found.violations[0]?.field, "key", "field");
  }

  async delete(withRoute: boolean): Promise<void> {
    const { models, routes } = this.#connection;
    if (withRoute) {
      const request = { name: this.#route(), requestId: randomUUID() };
      await call(routes, routes.deleteRoute, DeleteRouteRequest.fromPartial(request));
    }
    for (const name of this.#made.splice(0).reverse()) {
      const request = { name: this.#model(name), etag: "", requestId: randomUUID() };
      await call(models, models.deleteModel, request);
    }
    let found = await refused(this.#predict(this.#key("echo"), texts("x", ["x"])));
    checkError(found, status.NOT_FOUND, "KEY_NOT_FOUND");
    found = await refused(call(models, models.getModel, { name: this.#model("text") }));
    checkError(found, status.NOT_FOUND, "MODEL_NOT_FOUND");
  }

  #word(name: string): string {
    const word = this.#words.get(name);
    if (word === undefined) throw new Failed(`no ${name}= was given`);
    return word;
  }

  #key(name: string): string {
    return `${this.#prefix}/${name}`;
  }

  #model(name: string): string {
    return `models/${this.#prefix}-${name}`;
  }

  #route(): string {
    return `routes/${this.#prefix}-split`;
  }

  #labels(): string[] {
    return this.#word("labels").split(",");
  }

  async #create(name: string, model: Model, requestId: string = randomUUID()): Promise<Model> {
    const { models } = this.#connection;
    const request = { modelId: `${this.#prefix}-${name}`, model, requestId };
    const { model: created } = await call(
      models,
      models.createModel,
      CreateModelRequest.fromPartial(request),
    );
    if (!created) throw new Failed("CreateModel answered without a model");
    if (!this.#made.includes(name)) this.#made.push(name);
    check(created.name, this.#model(name), "name of the model");
    check(created.keys, model.keys, "keys of the model");
    check(created.owner, ModelOwner.MODEL_OWNER_API, "owner of the model");
    return created;
  }

  async #loadDone(): Promise<{ sizeBytes: bigint; sharedBytes: bigint }> {
    let revision = this.#revision;
    const request = WatchEventsRequest.fromPartial({ epoch: this.#epoch, revision });
    const watch = this.#connection.admin.watchEvents(request, within(LONG_MS));
    try {
      for await (const message of watch) {
        for (const event of message.events) {
          need(event.revision > revision, `${event.revision} comes behind ${revision}`);
          revision = event.revision;
          const isLoad = event.type === EventType.EVENT_TYPE_LOAD_DONE;
          if (isLoad && event.subject === this.#model("text")) return event;
        }
      }
    } finally {
      cancel(watch);
    }
    throw new Failed("the watch ended before the load");
  }

  #predict(key: string, tensor: Tensor, affinity = ""): Promise<PredictResponse> {
    const { inference } = this.#connection;
    const request = PredictRequest.fromPartial({ key, inputs: [tensor], affinity });
    return call(inference, inference.predict, request);
  }

  #streamed(id: bigint): PredictRequest {
    const echoes = id % 2n === 0n;
    const key = id === 1015n ? "nobody" : echoes ? "echo" : "text";
    return PredictRequest.fromPartial({
      key: this.#key(key),
      inputs: [echoes ? texts("x", [`item ${id}`]) : texts("text", [TEXT])],
    });
  }

  async #generated(): Promise<string> {
    const request = { key: this.#key("generate"), prompt: "the cat sat", maxNewTokens: 5 };
    const stream = this.#connection.inference.generate(
      GenerateRequest.fromPartial(request),
      within(LONG_MS),
    );
    const finishes: FinishReason[] = [];
    const tokens: bigint[] = [];
    let text = "";
    let last = { count: 0, model: "" };
    for await (const message of stream) {
      finishes.push(message.finish);
      tokens.push(...message.tokenIds);
      text += message.text;
      last = { count: message.tokenCount, model: message.served?.model ?? "" };
    }
    check(tokens, this.#word("tokens").split(",").map(BigInt), "tokens");
    check(finishes.pop(), FinishReason.FINISH_REASON_LENGTH, "finish of the last message");
    for (const finish of finishes) {
      check(finish, FinishReason.FINISH_REASON_UNSPECIFIED, "finish of a message");
    }
    check(last, { count: 5, model: this.#model("generate") }, "token_count and served.model");
    return text;
  }
}

const STEPS: { [step: string]: (run: Scenario, steps: string[]) => Promise<void> } = {
  "create-models": (run) => run.createModels(),
  "create-route": (run) => run.createRoute(),
  load: (run) => run.load(),
  watch: (run) => run.watch(),
  predict: (run) => run.predict(),
  route: (run) => run.route(),
  stream: (run) => run.stream(),
  generate: (run) => run.generate(),
  errors: (run) => run.errors(),
  delete: (run, steps) => run.delete(steps.includes("create-route")),
};

async function main(args: string[]): Promise<number> {
  const words = new Map(
    args.map((arg): [string, string] => {
      const at = arg.indexOf("=");
      return [arg.slice(0, at), arg.slice(at + 1)];
    }),
  );
  const target = words.get("target");
  const steps = (words.get("steps") ?? Object.keys(STEPS).join(",")).split(",");
  const unknown = steps.find((step) => !(step in STEPS));
  if (unknown !== undefined || !target || !words.get("prefix")) {
    console.error(unknown !== undefined ? `no such step: ${unknown}` : "target= and prefix= are needed");
    return 2;
  }
  const connection = new Connection(target);
  let exit = 0;
  try {
    const run = new Scenario(connection, words);
    for (const step of steps) {
      try {
        await STEPS[step]!(run, steps);
        console.log(`ok ${step}`);
      } catch (error) {
        exit = 1;
        const why = error instanceof Error ? error.message : String(error);
        console.log(`not ok ${step}: ${why.replaceAll(/\s+/g, " ")}`);
      }
    }
  } finally {
    connection.close();
  }
  return exit;
}

process.exitCode = await main(process.argv.slice(2));
