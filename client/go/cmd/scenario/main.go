// The clients' scenario in Go; client/SCENARIO.md says what each step is.
package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"reflect"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"modelyard.dev/client/modelyard"
	pb "modelyard.dev/client/modelyardv1"
)

const (
	deadline     = 30 * time.Second
	longDeadline = 60 * time.Second
	text         = "the big dog ran"
)

type scenario struct {
	*modelyard.Connection
	words    map[string]string
	steps    []string
	made     []string
	epoch    string
	revision int64
}

var steps = []struct {
	name string
	run  func(*scenario) error
}{
	{"create-models", (*scenario).createModels},
	{"create-route", (*scenario).createRoute},
	{"load", (*scenario).load},
	{"watch", (*scenario).watch},
	{"predict", (*scenario).predict},
	{"route", (*scenario).route},
	{"stream", (*scenario).stream},
	{"generate", (*scenario).generate},
	{"errors", (*scenario).errors},
	{"delete", (*scenario).delete},
}

func main() {
	os.Exit(run(os.Args[1:]))
}

func run(arguments []string) int {
	words := map[string]string{}
	for _, argument := range arguments {
		if at := strings.IndexByte(argument, '='); at >= 0 {
			words[argument[:at]] = argument[at+1:]
		}
	}
	known := map[string]func(*scenario) error{}
	var asked []string
	for _, step := range steps {
		known[step.name] = step.run
		asked = append(asked, step.name)
	}
	if words["steps"] != "" {
		asked = strings.Split(words["steps"], ",")
	}
	for _, step := range asked {
		if known[step] == nil {
			fmt.Fprintln(os.Stderr, "no such step:", step)
			return 2
		}
	}
	if words["target"] == "" || words["prefix"] == "" {
		fmt.Fprintln(os.Stderr, "target= and prefix= are needed")
		return 2
	}
	connection, err := modelyard.Dial(words["target"], grpc.WithInsecure())
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	defer connection.Close()
	s := &scenario{Connection: connection, words: words, steps: asked}
	exit := 0
	for _, step := range asked {
		if err := known[step](s); err != nil {
			exit = 1
			fmt.Printf("not ok %s: %s\n", step, strings.Join(strings.Fields(err.Error()), " "))
		} else {
			fmt.Printf("ok %s\n", step)
		}
	}
	return exit
}

func (s *scenario) createModels() error {
	requestID := newID()
	echo := &pb.Model{Runtime: "identity", Keys: []string{s.key("echo")}}
	first, err := s.create("echo", echo, requestID)
	if err != nil {
		return err
	}
	replay, err := s.create("echo", echo, requestID)
	if err != nil {
		return err
	}
	if err := check("etag of the replay", replay.Etag, first.Etag); err != nil {
		return err
	}
	created, err := s.create("text", &pb.Model{
		Runtime: "transformers",
		Task:    "text-classification",
		Source:  &pb.ModelSource{Root: s.words["root"], Folder: s.words["folder"]},
		Keys:    []string{s.key("text")},
	}, newID())
	if err != nil {
		return err
	}
	if created.EstimatedBytes <= 0 {
		return errors.New("estimated_bytes of the classifier is 0")
	}
	ctx, cancel := within(deadline)
	defer cancel()
	got, err := s.Models.GetModel(ctx, &pb.GetModelRequest{Name: s.model("text")})
	if err != nil {
		return err
	}
	return check("etag of GetModel", got.Model.Etag, created.Etag)
}

func (s *scenario) createRoute() error {
	ctx, cancel := within(deadline)
	defer cancel()
	answer, err := s.Routes.CreateRoute(ctx, &pb.CreateRouteRequest{
		RouteId: s.words["prefix"] + "-split",
		Route: &pb.Route{
			Keys: []string{s.key("split")},
			Target: &pb.Route_Split{Split: &pb.SplitTarget{
				Branches: []*pb.Branch{
					{Name: "blue", Target: s.model("echo"), Weight: 3},
					{Name: "green", Target: s.model("text"), Weight: 1},
				},
				Salt: "scenario",
			}},
		},
		RequestId: newID(),
	})
	if err != nil {
		return err
	}
	var branches []string
	for _, branch := range answer.Route.GetSplit().GetBranches() {
		branches = append(branches, fmt.Sprint(branch.Name, " ", branch.Target, " ", branch.Weight))
	}
	expected := []string{"blue " + s.model("echo") + " 3", "green " + s.model("text") + " 1"}
	return all(
		check("name of the route", answer.Route.Name, s.routeName()),
		check("branches of the route", branches, expected),
	)
}

func (s *scenario) load() error {
	watching, stop := within(deadline)
	defer stop()
	watch, err := s.Admin.WatchEvents(watching, &pb.WatchEventsRequest{})
	if err != nil {
		return err
	}
	first, err := watch.Recv()
	if err != nil {
		return err
	}
	stop()
	s.epoch, s.revision = first.Epoch, first.Revision

	ctx, cancel := within(deadline)
	defer cancel()
	answer, err := s.Residencies.LoadModel(ctx, &pb.LoadModelRequest{Model: s.model("text")})
	if err != nil {
		return err
	}
	return check("model of the residency", answer.Residency.Model, s.model("text"))
}

func (s *scenario) watch() error {
	loaded, err := s.loadDone()
	if err != nil {
		return err
	}
	if loaded.SizeBytes+loaded.SharedBytes <= 0 {
		return errors.New("the loaded model holds 0 bytes")
	}
	ctx, cancel := within(deadline)
	defer cancel()
	watch, err := s.Residencies.WatchResidencies(ctx, &pb.WatchResidenciesRequest{})
	if err != nil {
		return err
	}
	state := pb.ResidencyState_RESIDENCY_STATE_UNSPECIFIED
	for {
		message, err := watch.Recv()
		if err != nil {
			return err
		}
		for _, residency := range message.Residencies {
			if residency.Model == s.model("text") {
				state = residency.State
			}
		}
		if message.SnapshotComplete {
			break
		}
	}
	return check("state of the classifier", state, pb.ResidencyState_RESIDENCY_STATE_RESIDENT)
}

func (s *scenario) predict() error {
	raw := floats(0.5, -1.25, 3, 1e-3, 65504, float32(math.Copysign(0, -1)))
	answer, err := s.ask(s.key("echo"), rawTensor([]int64{2, 3}, raw), "")
	if err != nil {
		return err
	}
	echoed, err := only(answer)
	if err != nil {
		return err
	}
	if !bytes.Equal(echoed.GetRaw(), raw) {
		return fmt.Errorf("bytes of the echo are %x, not %x", echoed.GetRaw(), raw)
	}
	if err := all(
		check("type of the echo", echoed.DataType, pb.DataType_DATA_TYPE_FLOAT32),
		check("shape of the echo", echoed.Shape, []int64{2, 3}),
		check("served.model", answer.Served.GetModel(), s.model("echo")),
	); err != nil {
		return err
	}

	words := []string{"naïve", "日本語"}
	if answer, err = s.ask(s.words["prefix"]+"-echo", texts("x", words...), ""); err != nil {
		return err
	}
	if echoed, err = only(answer); err != nil {
		return err
	}
	if err := check("echoed texts", echoed.GetText().GetValues(), words); err != nil {
		return err
	}

	answer, err = s.ask(s.key("text"), texts("text", text, "you hate this small cat"), "")
	if err != nil {
		return err
	}
	score := output(answer, "score")
	if err := all(
		check("labels", output(answer, "label").GetText().GetValues(), s.labels()),
		check("type of the scores", score.GetDataType(), pb.DataType_DATA_TYPE_FLOAT32),
		check("shape of the scores", score.GetShape(), []int64{2}),
		check("bytes of the scores", len(score.GetRaw()), 8),
		check("served.model", answer.Served.GetModel(), s.model("text")),
		check("served.cold", answer.Served.GetCold(), false),
		check("served.run_duration is set", answer.Served.GetRunDuration() != nil, true),
	); err != nil {
		return err
	}
	for at := 0; at < 8; at += 4 {
		value := math.Float32frombits(binary.LittleEndian.Uint32(score.GetRaw()[at:]))
		if !(value > 0 && value <= 1) {
			return fmt.Errorf("a score is %v", value)
		}
	}
	return nil
}

func (s *scenario) route() error {
	models := map[string]string{"blue": s.model("echo"), "green": s.model("text")}
	met := map[string]bool{}
	file, err := os.Open(s.words["branches"])
	if err != nil {
		return err
	}
	defer file.Close()
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		parts := strings.Split(lines.Text(), "\t")
		affinity, branch := parts[0], parts[1]
		answer, err := s.ask(s.key("split"), texts("text", text), affinity)
		if err != nil {
			return err
		}
		if err := all(
			check("served.route", answer.Served.GetRoute(), s.routeName()),
			check("branch of "+affinity, answer.Served.GetBranch(), branch),
			check("model of "+affinity, answer.Served.GetModel(), models[branch]),
		); err != nil {
			return err
		}
		if branch == "blue" {
			echoed, err := only(answer)
			if err != nil {
				return err
			}
			if err := check("echoed text", echoed.GetText().GetValues(), []string{text}); err != nil {
				return err
			}
		}
		met[branch] = true
	}
	if err := lines.Err(); err != nil {
		return err
	}
	return check("set of branches", met, map[string]bool{"blue": true, "green": true})
}

func (s *scenario) stream() error {
	ctx, cancel := within(longDeadline)
	defer cancel()
	stream, err := s.Inference.PredictStream(ctx)
	if err != nil {
		return err
	}
	for first := int64(1000); first < 1016; first += 4 {
		message := &pb.PredictStreamRequest{}
		for id := first; id < first+4; id++ {
			message.Items = append(message.Items, s.item(id))
		}
		if err := stream.Send(message); err != nil {
			return err
		}
	}
	if err := stream.CloseSend(); err != nil {
		return err
	}
	results := map[int64]*pb.PredictStreamResult{}
	for {
		message, err := stream.Recv()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		for _, result := range message.Results {
			if results[result.Id] != nil {
				return fmt.Errorf("%d is answered twice", result.Id)
			}
			results[result.Id] = result
		}
	}
	if err := check("number of answers", len(results), 16); err != nil {
		return err
	}
	for id := int64(1000); id < 1016; id++ {
		if err := s.checkResult(id, results[id]); err != nil {
			return err
		}
	}
	return nil
}

func (s *scenario) checkResult(id int64, result *pb.PredictStreamResult) error {
	what := fmt.Sprint("answer of ", id)
	switch {
	case id == 1015:
		return all(
			check("code of 1015", codes.Code(result.GetError().GetCode()), codes.NotFound),
			check("reason of 1015", result.GetError().GetReason(), pb.ErrorReason_ERROR_REASON_KEY_NOT_FOUND),
		)
	case result.GetResponse() == nil:
		return fmt.Errorf("%s is %v", what, result)
	case id%2 == 0:
		echoed, err := only(result.GetResponse())
		if err != nil {
			return err
		}
		return check(what, echoed.GetText().GetValues(), []string{fmt.Sprint("item ", id)})
	default:
		return check(what, output(result.GetResponse(), "label").GetText().GetValues(), s.labels()[:1])
	}
}

func (s *scenario) generate() error {
	_, err := s.create("generate", &pb.Model{
		Runtime: "transformers",
		Task:    "text-generation",
		Source:  &pb.ModelSource{Root: s.words["root"], Folder: s.words["generation_folder"]},
		Keys:    []string{s.key("generate")},
	}, newID())
	if err != nil {
		return err
	}
	first, err := s.generated()
	if err != nil {
		return err
	}
	second, err := s.generated()
	if err != nil {
		return err
	}
	return check("second text", second, first)
}

func (s *scenario) errors() error {
	_, err := s.ask(s.key("nobody"), texts("x", "x"), "")
	found := modelyard.DetailsOf(err)
	if err := all(
		checkError(found, codes.NotFound, "KEY_NOT_FOUND"),
		check("resource_name", found.Resource, s.key("nobody")),
	); err != nil {
		return err
	}
	_, err = s.ask(s.key("echo"), rawTensor([]int64{2}, make([]byte, 4)), "")
	if err := checkViolation(err, "INVALID_TENSOR", "inputs[0]"); err != nil {
		return err
	}
	_, err = s.create("echo", &pb.Model{Runtime: "identity", Keys: []string{s.key("echo")}}, newID())
	found = modelyard.DetailsOf(err)
	if err := checkError(found, codes.AlreadyExists, "ALREADY_EXISTS"); err != nil {
		return err
	}
	_, err = s.ask(s.key("/.."), texts("x", "x"), "")
	return checkViolation(err, "INVALID_FIELD", "key")
}

func (s *scenario) delete() error {
	for _, step := range s.steps {
		if step != "create-route" {
			continue
		}
		ctx, cancel := within(deadline)
		defer cancel()
		request := &pb.DeleteRouteRequest{Name: s.routeName(), RequestId: newID()}
		if _, err := s.Routes.DeleteRoute(ctx, request); err != nil {
			return err
		}
	}
	ctx, cancel := within(deadline)
	defer cancel()
	for ; len(s.made) > 0; s.made = s.made[1:] {
		request := &pb.DeleteModelRequest{Name: s.model(s.made[0]), RequestId: newID()}
		if _, err := s.Models.DeleteModel(ctx, request); err != nil {
			return err
		}
	}
	_, err := s.ask(s.key("echo"), texts("x", "x"), "")
	if err := checkError(modelyard.DetailsOf(err), codes.NotFound, "KEY_NOT_FOUND"); err != nil {
		return err
	}
	_, err = s.Models.GetModel(ctx, &pb.GetModelRequest{Name: s.model("text")})
	return checkError(modelyard.DetailsOf(err), codes.NotFound, "MODEL_NOT_FOUND")
}

func (s *scenario) key(name string) string   { return s.words["prefix"] + "/" + name }
func (s *scenario) model(name string) string { return "models/" + s.words["prefix"] + "-" + name }
func (s *scenario) routeName() string        { return "routes/" + s.words["prefix"] + "-split" }
func (s *scenario) labels() []string         { return strings.Split(s.words["labels"], ",") }

func (s *scenario) create(name string, model *pb.Model, requestID string) (*pb.Model, error) {
	ctx, cancel := within(deadline)
	defer cancel()
	answer, err := s.Models.CreateModel(ctx, &pb.CreateModelRequest{
		ModelId: s.words["prefix"] + "-" + name, Model: model, RequestId: requestID,
	})
	if err != nil {
		return nil, err
	}
	if len(s.made) == 0 || s.made[len(s.made)-1] != name {
		s.made = append(s.made, name)
	}
	return answer.Model, all(
		check("name of the model", answer.Model.Name, s.model(name)),
		check("keys of the model", answer.Model.Keys, model.Keys),
		check("owner of the model", answer.Model.Owner, pb.ModelOwner_MODEL_OWNER_API),
	)
}

func (s *scenario) loadDone() (*pb.Event, error) {
	ctx, cancel := within(longDeadline)
	defer cancel()
	request := &pb.WatchEventsRequest{Epoch: s.epoch, Revision: s.revision}
	watch, err := s.Admin.WatchEvents(ctx, request)
	if err != nil {
		return nil, err
	}
	revision := s.revision
	for {
		message, err := watch.Recv()
		if err != nil {
			return nil, err
		}
		for _, event := range message.Events {
			if event.Revision <= revision {
				return nil, fmt.Errorf("%d comes behind %d", event.Revision, revision)
			}
			revision = event.Revision
			if event.Type == pb.EventType_EVENT_TYPE_LOAD_DONE && event.Subject == s.model("text") {
				return event, nil
			}
		}
	}
}

func (s *scenario) ask(key string, tensor *pb.Tensor, affinity string) (*pb.PredictResponse, error) {
	ctx, cancel := within(deadline)
	defer cancel()
	return s.Inference.Predict(ctx, &pb.PredictRequest{
		Key: key, Inputs: []*pb.Tensor{tensor}, Affinity: affinity,
	})
}

func (s *scenario) item(id int64) *pb.PredictStreamItem {
	key, tensor := s.key("text"), texts("text", text)
	switch {
	case id == 1015:
		key = s.key("nobody")
	case id%2 == 0:
		key, tensor = s.key("echo"), texts("x", fmt.Sprint("item ", id))
	}
	request := &pb.PredictRequest{Key: key, Inputs: []*pb.Tensor{tensor}}
	return &pb.PredictStreamItem{Id: id, Request: request}
}

func (s *scenario) generated() (string, error) {
	ctx, cancel := within(longDeadline)
	defer cancel()
	stream, err := s.Inference.Generate(ctx, &pb.GenerateRequest{
		Key: s.key("generate"), Prompt: "the cat sat", MaxNewTokens: 5,
	})
	if err != nil {
		return "", err
	}
	var whole strings.Builder
	var tokens []string
	last := &pb.GenerateResponse{}
	for {
		message, err := stream.Recv()
		if err == io.EOF {
			break
		}
		if err != nil {
			return "", err
		}
		if last.Finish != pb.FinishReason_FINISH_REASON_UNSPECIFIED {
			return "", errors.New("a message comes behind the last one")
		}
		last = message
		whole.WriteString(message.Text)
		for _, token := range message.TokenIds {
			tokens = append(tokens, strconv.FormatInt(token, 10))
		}
	}
	return whole.String(), all(
		check("tokens", strings.Join(tokens, ","), s.words["tokens"]),
		check("finish", last.Finish, pb.FinishReason_FINISH_REASON_LENGTH),
		check("token_count", last.TokenCount, int32(5)),
		check("served.model", last.Served.GetModel(), s.model("generate")),
	)
}

func within(time time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), time)
}

func newID() string {
	id := make([]byte, 16)
	if _, err := rand.Read(id); err != nil {
		panic(err)
	}
	return fmt.Sprintf("%x", id)
}

func floats(values ...float32) []byte {
	raw := make([]byte, 4*len(values))
	for i, value := range values {
		binary.LittleEndian.PutUint32(raw[4*i:], math.Float32bits(value))
	}
	return raw
}

func rawTensor(shape []int64, raw []byte) *pb.Tensor {
	return &pb.Tensor{
		Name:     "x",
		DataType: pb.DataType_DATA_TYPE_FLOAT32,
		Shape:    shape,
		Content:  &pb.Tensor_Raw{Raw: raw},
	}
}

func texts(name string, values ...string) *pb.Tensor {
	return &pb.Tensor{
		Name:     name,
		DataType: pb.DataType_DATA_TYPE_TEXT,
		Shape:    []int64{int64(len(values))},
		Content:  &pb.Tensor_Text{Text: &pb.TextElements{Values: values}},
	}
}

func only(answer *pb.PredictResponse) (*pb.Tensor, error) {
	if len(answer.Outputs) != 1 {
		return nil, fmt.Errorf("number of outputs is %d, not 1", len(answer.Outputs))
	}
	return answer.Outputs[0], nil
}

// output is nil if there is none; what is got from that is empty.
func output(answer *pb.PredictResponse, name string) *pb.Tensor {
	for _, tensor := range answer.Outputs {
		if tensor.Name == name {
			return tensor
		}
	}
	return nil
}

func check(what string, found, expected interface{}) error {
	if reflect.DeepEqual(found, expected) {
		return nil
	}
	return fmt.Errorf("%s is %v, not %v", what, found, expected)
}

func checkError(found modelyard.ErrorDetails, code codes.Code, reason string) error {
	return all(
		check("code", found.Code, code),
		check("reason", found.Reason, reason),
		check("domain", found.Domain, "modelyard"),
	)
}

func checkViolation(err error, reason, field string) error {
	found := modelyard.DetailsOf(err)
	if err := checkError(found, codes.InvalidArgument, reason); err != nil {
		return err
	}
	if len(found.Violations) == 0 {
		return errors.New("no field is named")
	}
	return check("field", found.Violations[0].Field, field)
}

// all is the first of several errors.
func all(found ...error) error {
	for _, err := range found {
		if err != nil {
			return err
		}
	}
	return nil
}
