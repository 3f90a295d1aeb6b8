package dev.modelyard.client;

import com.google.protobuf.ByteString;
import dev.modelyard.v1.Branch;
import dev.modelyard.v1.CreateModelRequest;
import dev.modelyard.v1.CreateRouteRequest;
import dev.modelyard.v1.DataType;
import dev.modelyard.v1.DeleteModelRequest;
import dev.modelyard.v1.DeleteRouteRequest;
import dev.modelyard.v1.ErrorReason;
import dev.modelyard.v1.Event;
import dev.modelyard.v1.EventType;
import dev.modelyard.v1.FinishReason;
import dev.modelyard.v1.GenerateRequest;
import dev.modelyard.v1.GenerateResponse;
import dev.modelyard.v1.GetModelRequest;
import dev.modelyard.v1.LoadModelRequest;
import dev.modelyard.v1.Model;
import dev.modelyard.v1.ModelOwner;
import dev.modelyard.v1.ModelSource;
import dev.modelyard.v1.PredictRequest;
import dev.modelyard.v1.PredictResponse;
import dev.modelyard.v1.PredictStreamItem;
import dev.modelyard.v1.PredictStreamRequest;
import dev.modelyard.v1.PredictStreamResponse;
import dev.modelyard.v1.PredictStreamResult;
import dev.modelyard.v1.Residency;
import dev.modelyard.v1.ResidencyState;
import dev.modelyard.v1.Route;
import dev.modelyard.v1.Served;
import dev.modelyard.v1.SplitTarget;
import dev.modelyard.v1.Tensor;
import dev.modelyard.v1.TextElements;
import dev.modelyard.v1.WatchEventsRequest;
import dev.modelyard.v1.WatchEventsResponse;
import dev.modelyard.v1.WatchResidenciesRequest;
import dev.modelyard.v1.WatchResidenciesResponse;
import io.grpc.Context;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.stub.StreamObserver;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayDeque;
import java.util.Deque;
import java.util.HashSet;
import java.util.Iterator;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.TreeMap;
import java.util.UUID;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.TimeUnit;

/** The clients' scenario in Java; client/SCENARIO.md says what each step is. */
public final class Scenario {
  private static final long LONG_S = 60;
  private static final String TEXT = "the big dog ran";

  private interface Step {
    void run(Scenario scenario) throws Exception;
  }

  private static final Map<String, Step> STEPS = new LinkedHashMap<>();

  static {
    STEPS.put("create-models", Scenario::createModels);
    STEPS.put("create-route", Scenario::createRoute);
    STEPS.put("load", Scenario::load);
    STEPS.put("watch", Scenario::watch);
    STEPS.put("predict", Scenario::predict);
    STEPS.put("route", Scenario::route);
    STEPS.put("stream", Scenario::stream);
    STEPS.put("generate", Scenario::generate);
    STEPS.put("errors", Scenario::errors);
    STEPS.put("delete", Scenario::delete);
  }

  private static final class Failed extends Exception {
    private static final long serialVersionUID = 1;

    Failed(String what) {
      super(what);
    }
  }

  private final Connection connection;
  private final Map<String, String> words;
  private final List<String> steps;
  private final Deque<String> made = new ArrayDeque<>();
  private String epoch = "";
  private long revision = 0;

  private Scenario(Connection connection, Map<String, String> words, List<String> steps) {
    this.connection = connection;
    this.words = words;
    this.steps = steps;
  }

  public static void main(String[] args) {
    Map<String, String> words = new LinkedHashMap<>();
    for (String arg : args) {
      int at = arg.indexOf('=');
      if (at >= 0) {
        words.put(arg.substring(0, at), arg.substring(at + 1));
      }
    }
    List<String> steps =
        words.containsKey("steps")
            ? List.of(words.get("steps").split(","))
            : List.copyOf(STEPS.keySet());
    for (String step : steps) {
      if (!STEPS.containsKey(step)) {
        System.err.println("no such step: " + step);
        System.exit(2);
      }
    }
    if (!words.containsKey("target") || !words.containsKey("prefix")) {
      System.err.println("target= and prefix= are needed");
      System.exit(2);
    }
    boolean ok;
    try (Connection connection = new Connection(words.get("target"))) {
      ok = new Scenario(connection, words, steps).run();
    }
    System.exit(ok ? 0 : 1);
  }

  private boolean run() {
    boolean ok = true;
    for (String step : steps) {
      try {
        STEPS.get(step).run(this);
        System.out.println("ok " + step);
      } catch (Exception e) {
        ok = false;
        String why = e instanceof Failed ? e.getMessage() : e.toString();
        System.out.println("not ok " + step + ": " + why.replaceAll("\\s+", " "));
      }
    }
    return ok;
  }

  private void createModels() throws Failed {
    String requestId = newId();
    Model echo = Model.newBuilder().setRuntime("identity").addKeys(key("echo")).build();
    Model first = create("echo", echo, requestId);
    check("etag of the replay", create("echo", echo, requestId).getEtag(), first.getEtag());
    Model text = create("text", model("text", "text-classification", "folder"), newId());
    need(text.getEstimatedBytes() > 0, "estimated_bytes of the classifier is 0");
    GetModelRequest get = GetModelRequest.newBuilder().setName(modelName("text")).build();
    check("etag of GetModel", connection.models().getModel(get).getModel().getEtag(), text.getEtag());
  }

  private void createRoute() throws Failed {
    List<Branch> branches =
        List.of(branch("blue", modelName("echo"), 3), branch("green", modelName("text"), 1));
    SplitTarget split =
        SplitTarget.newBuilder().addAllBranches(branches).setSalt("scenario").build();
    Route route =
        connection
            .routes()
            .createRoute(
                CreateRouteRequest.newBuilder()
                    .setRouteId(words.get("prefix") + "-split")
                    .setRoute(Route.newBuilder().addKeys(key("split")).setSplit(split))
                    .setRequestId(newId())
                    .build())
            .getRoute();
    check("name of the route", route.getName(), routeName());
    check("branches of the route", route.getSplit().getBranchesList(), branches);
  }

  private void load() throws Failed {
    WatchEventsResponse first =
        cancelling(() -> connection.admin().watchEvents(WatchEventsRequest.getDefaultInstance()).next());
    epoch = first.getEpoch();
    revision = first.getRevision();
    Residency residency =
        connection
            .residencies()
            .loadModel(LoadModelRequest.newBuilder().setModel(modelName("text")).build())
            .getResidency();
    check("model of the residency", residency.getModel(), modelName("text"));
  }

  private void watch() throws Failed {
    Event loaded = cancelling(this::loadDone);
    need(loaded.getSizeBytes() + loaded.getSharedBytes() > 0, "the loaded model holds 0 bytes");
    ResidencyState state =
        cancelling(
            () -> {
              ResidencyState found = ResidencyState.RESIDENCY_STATE_UNSPECIFIED;
              Iterator<WatchResidenciesResponse> watch =
                  connection
                      .residencies()
                      .watchResidencies(WatchResidenciesRequest.getDefaultInstance());
              WatchResidenciesResponse message;
              do {
                message = watch.next();
                for (Residency residency : message.getResidenciesList()) {
                  if (residency.getModel().equals(modelName("text"))) {
                    found = residency.getState();
                  }
                }
              } while (!message.getSnapshotComplete());
              return found;
            });
    check("state of the classifier", state, ResidencyState.RESIDENCY_STATE_RESIDENT);
  }

  private void predict() throws Failed {
    ByteBuffer buffer = ByteBuffer.allocate(24).order(ByteOrder.LITTLE_ENDIAN);
    for (float value : new float[] {0.5f, -1.25f, 3, 1e-3f, 65504, -0.0f}) {
      buffer.putFloat(value);
    }
    ByteString raw = ByteString.copyFrom(buffer.flip());
    PredictResponse answer = ask(key("echo"), floats(raw, 2, 3), "");
    Tensor echoed = only(answer);
    check("type of the echo", echoed.getDataType(), DataType.DATA_TYPE_FLOAT32);
    check("shape of the echo", echoed.getShapeList(), List.of(2L, 3L));
    check("bytes of the echo", echoed.getRaw(), raw);
    check("served.model", answer.getServed().getModel(), modelName("echo"));

    List<String> texts = List.of("naïve", "日本語");
    answer = ask(words.get("prefix") + "-echo", texts("x", texts), "");
    check("echoed texts", valuesOf(only(answer)), texts);

    answer = ask(key("text"), texts("text", List.of(TEXT, "you hate this small cat")), "");
    check("labels", valuesOf(output(answer, "label")), labels());
    Tensor score = output(answer, "score");
    check("type of the scores", score.getDataType(), DataType.DATA_TYPE_FLOAT32);
    check("shape of the scores", score.getShapeList(), List.of(2L));
    check("bytes of the scores", score.getRaw().size(), 8);
    ByteBuffer scores = score.getRaw().asReadOnlyByteBuffer().order(ByteOrder.LITTLE_ENDIAN);
    while (scores.hasRemaining()) {
      float value = scores.getFloat();
      need(value > 0 && value <= 1, "a score is " + value);
    }
    Served served = answer.getServed();
    check("served.model", served.getModel(), modelName("text"));
    check("served.cold", served.getCold(), false);
    need(served.hasRunDuration(), "served.run_duration is not set");
  }

  private void route() throws Exception {
    Map<String, String> models = Map.of("blue", modelName("echo"), "green", modelName("text"));
    Set<String> met = new HashSet<>();
    for (String line : Files.readAllLines(Path.of(word("branches")))) {
      String[] parts = line.split("\t");
      PredictResponse answer = ask(key("split"), texts("text", List.of(TEXT)), parts[0]);
      Served served = answer.getServed();
      check("served.route", served.getRoute(), routeName());
      check("branch of " + parts[0], served.getBranch(), parts[1]);
      check("model of " + parts[0], served.getModel(), models.get(parts[1]));
      if (parts[1].equals("blue")) {
        check("echoed text", valuesOf(only(answer)), List.of(TEXT));
      }
      met.add(parts[1]);
    }
    check("set of branches", met, models.keySet());
  }

  private void stream() throws Exception {
    CompletableFuture<Map<Long, PredictStreamResult>> end = new CompletableFuture<>();
    Map<Long, PredictStreamResult> results = new TreeMap<>();
    StreamObserver<PredictStreamRequest> requests =
        connection
            .inferenceAsync()
            .withDeadlineAfter(LONG_S, TimeUnit.SECONDS)
            .predictStream(
                new StreamObserver<PredictStreamResponse>() {
                  @Override
                  public void onNext(PredictStreamResponse message) {
                    for (PredictStreamResult result : message.getResultsList()) {
                      if (results.put(result.getId(), result) != null) {
                        end.completeExceptionally(new Failed(result.getId() + " is answered twice"));
                      }
                    }
                  }

                  @Override
                  public void onError(Throwable error) {
                    end.completeExceptionally(error);
                  }

                  @Override
                  public void onCompleted() {
                    end.complete(results);
                  }
                });
    for (long first = 1000; first < 1016; first += 4) {
      PredictStreamRequest.Builder message = PredictStreamRequest.newBuilder();
      for (long id = first; id < first + 4; id++) {
        message.addItems(item(id));
      }
      requests.onNext(message.build());
    }
    requests.onCompleted();
    for (PredictStreamResult result : end.get(LONG_S + 5, TimeUnit.SECONDS).values()) {
      checkResult(result);
    }
    check("number of answers", results.size(), 16);
  }

  private void checkResult(PredictStreamResult result) throws Failed {
    long id = result.getId();
    need(id >= 1000 && id < 1016, "nobody has asked for " + id);
    if (id == 1015) {
      check("code of 1015", result.getError().getCode(), Status.Code.NOT_FOUND.value());
      check(
          "reason of 1015", result.getError().getReason(), ErrorReason.ERROR_REASON_KEY_NOT_FOUND);
      return;
    }
    need(result.hasResponse(), "answer of " + id + " is " + result);
    if (id % 2 == 0) {
      check("answer of " + id, valuesOf(only(result.getResponse())), List.of("item " + id));
    } else {
      List<String> found = valuesOf(output(result.getResponse(), "label"));
      check("answer of " + id, found, labels().subList(0, 1));
    }
  }

  private void generate() throws Failed {
    create("generate", model("generate", "text-generation", "generation_folder"), newId());
    String text = generated();
    check("second text", generated(), text);
  }

  private void errors() throws Failed {
    ErrorDetails found = refused(() -> ask(key("nobody"), texts("x", List.of("x")), ""));
    checkError(found, Status.Code.NOT_FOUND, "KEY_NOT_FOUND");
    check("resource_name", found.resource(), key("nobody"));

    Tensor tooShort = floats(ByteString.copyFrom(new byte[4]), 2);
    found = refused(() -> ask(key("echo"), tooShort, ""));
    checkError(found, Status.Code.INVALID_ARGUMENT, "INVALID_TENSOR");
    check("field", found.violations().get(0).getField(), "inputs[0]");

    Model echo = Model.newBuilder().setRuntime("identity").addKeys(key("echo")).build();
    found = refused(() -> create("echo", echo, newId()));
    checkError(found, Status.Code.ALREADY_EXISTS, "ALREADY_EXISTS");

    found = refused(() -> ask(key("/.."), texts("x", List.of("x")), ""));
    checkError(found, Status.Code.INVALID_ARGUMENT, "INVALID_FIELD");
    check("field", found.violations().get(0).getField(), "key");
  }

  private void delete() throws Failed {
    if (steps.contains("create-route")) {
      connection
          .routes()
          .deleteRoute(
              DeleteRouteRequest.newBuilder().setName(routeName()).setRequestId(newId()).build());
    }
    while (!made.isEmpty()) {
      connection
          .models()
          .deleteModel(
              DeleteModelRequest.newBuilder()
                  .setName(modelName(made.pop()))
                  .setRequestId(newId())
                  .build());
    }
    ErrorDetails found = refused(() -> ask(key("echo"), texts("x", List.of("x")), ""));
    checkError(found, Status.Code.NOT_FOUND, "KEY_NOT_FOUND");
    GetModelRequest get = GetModelRequest.newBuilder().setName(modelName("text")).build();
    found = refused(() -> connection.models().getModel(get));
    checkError(found, Status.Code.NOT_FOUND, "MODEL_NOT_FOUND");
  }

  private String word(String name) throws Failed {
    need(words.containsKey(name), "no " + name + "= was given");
    return words.get(name);
  }

  private String key(String name) {
    return words.get("prefix") + "/" + name;
  }

  private String modelName(String name) {
    return "models/" + words.get("prefix") + "-" + name;
  }

  private String routeName() {
    return "routes/" + words.get("prefix") + "-split";
  }

  private List<String> labels() throws Failed {
    return List.of(word("labels").split(","));
  }

  private Model model(String name, String task, String folder) throws Failed {
    return Model.newBuilder()
        .setRuntime("transformers")
        .setTask(task)
        .setSource(ModelSource.newBuilder().setRoot(word("root")).setFolder(word(folder)))
        .addKeys(key(name))
        .build();
  }

  private Model create(String name, Model model, String requestId) throws Failed {
    Model created =
        connection
            .models()
            .createModel(
                CreateModelRequest.newBuilder()
                    .setModelId(words.get("prefix") + "-" + name)
                    .setModel(model)
                    .setRequestId(requestId)
                    .build())
            .getModel();
    if (!made.contains(name)) {
      made.push(name);
    }
    check("name of the model", created.getName(), modelName(name));
    check("keys of the model", created.getKeysList(), model.getKeysList());
    check("owner of the model", created.getOwner(), ModelOwner.MODEL_OWNER_API);
    return created;
  }

  private Event loadDone() throws Failed {
    long last = revision;
    Iterator<WatchEventsResponse> watch =
        connection
            .admin()
            .withDeadlineAfter(LONG_S, TimeUnit.SECONDS)
            .watchEvents(
                WatchEventsRequest.newBuilder().setEpoch(epoch).setRevision(revision).build());
    while (watch.hasNext()) {
      for (Event event : watch.next().getEventsList()) {
        need(event.getRevision() > last, event.getRevision() + " comes behind " + last);
        last = event.getRevision();
        if (event.getType() == EventType.EVENT_TYPE_LOAD_DONE
            && event.getSubject().equals(modelName("text"))) {
          return event;
        }
      }
    }
    throw new Failed("the watch ended before the load");
  }

  private PredictResponse ask(String key, Tensor tensor, String affinity) {
    PredictRequest request =
        PredictRequest.newBuilder().setKey(key).addInputs(tensor).setAffinity(affinity).build();
    return connection.inference().predict(request);
  }

  private PredictStreamItem item(long id) {
    boolean echoes = id % 2 == 0;
    Tensor tensor =
        echoes ? texts("x", List.of("item " + id)) : texts("text", List.of(TEXT));
    String key = key(id == 1015 ? "nobody" : echoes ? "echo" : "text");
    return PredictStreamItem.newBuilder()
        .setId(id)
        .setRequest(PredictRequest.newBuilder().setKey(key).addInputs(tensor))
        .build();
  }

  private String generated() throws Failed {
    GenerateRequest request =
        GenerateRequest.newBuilder()
            .setKey(key("generate"))
            .setPrompt("the cat sat")
            .setMaxNewTokens(5)
            .build();
    StringBuilder text = new StringBuilder();
    StringBuilder tokens = new StringBuilder();
    GenerateResponse last = GenerateResponse.getDefaultInstance();
    Iterator<GenerateResponse> stream =
        connection.inference().withDeadlineAfter(LONG_S, TimeUnit.SECONDS).generate(request);
    while (stream.hasNext()) {
      need(
          last.getFinish() == FinishReason.FINISH_REASON_UNSPECIFIED,
          "a message comes behind the last one");
      last = stream.next();
      text.append(last.getText());
      last.getTokenIdsList().forEach(id -> tokens.append(tokens.length() > 0 ? "," : "").append(id));
    }
    check("tokens", tokens.toString(), word("tokens"));
    check("finish", last.getFinish(), FinishReason.FINISH_REASON_LENGTH);
    check("token_count", last.getTokenCount(), 5);
    check("served.model", last.getServed().getModel(), modelName("generate"));
    return text.toString();
  }

  private interface Call<T> {
    T get() throws Failed;
  }

  /** Cancels every call that is made in it when it ends: for streams that are not read to their end. */
  private static <T> T cancelling(Call<T> call) throws Failed {
    Context.CancellableContext context = Context.current().withCancellation();
    Context before = context.attach();
    try {
      return call.get();
    } finally {
      context.detach(before);
      context.cancel(null);
    }
  }

  private static ErrorDetails refused(Call<?> call) throws Failed {
    try {
      call.get();
    } catch (StatusRuntimeException e) {
      return ErrorDetails.of(e);
    }
    throw new Failed("a call that must be refused was answered");
  }

  private static String newId() {
    return UUID.randomUUID().toString();
  }

  private static Branch branch(String name, String target, long weight) {
    return Branch.newBuilder().setName(name).setTarget(target).setWeight(weight).build();
  }

  private static Tensor texts(String name, List<String> values) {
    return Tensor.newBuilder()
        .setName(name)
        .setDataType(DataType.DATA_TYPE_TEXT)
        .addShape(values.size())
        .setText(TextElements.newBuilder().addAllValues(values))
        .build();
  }

  private static Tensor floats(ByteString raw, long... shape) {
    Tensor.Builder tensor =
        Tensor.newBuilder().setName("x").setDataType(DataType.DATA_TYPE_FLOAT32).setRaw(raw);
    for (long dimension : shape) {
      tensor.addShape(dimension);
    }
    return tensor.build();
  }

  private static List<String> valuesOf(Tensor tensor) {
    return tensor.getText().getValuesList();
  }

  private static Tensor only(PredictResponse answer) throws Failed {
    check("number of outputs", answer.getOutputsCount(), 1);
    return answer.getOutputs(0);
  }

  private static Tensor output(PredictResponse answer, String name) throws Failed {
    for (Tensor tensor : answer.getOutputsList()) {
      if (tensor.getName().equals(name)) {
        return tensor;
      }
    }
    throw new Failed("there is no output " + name);
  }

  private static void check(String what, Object found, Object expected) throws Failed {
    need(expected.equals(found), what + " is " + found + ", not " + expected);
  }

  private static void checkError(ErrorDetails found, Status.Code code, String reason)
      throws Failed {
    check("code", found.code(), code);
    check("reason", found.reason(), reason);
    check("domain", found.domain(), "modelyard");
  }

  private static void need(boolean holds, String what) throws Failed {
    if (!holds) {
      throw new Failed(what);
    }
  }
}
