// Asks a key about a text: example 127.0.0.1:8470 acme/reviews "Kept me dry all week."
package main

import (
	"context"
	"fmt"
	"log"
	"os"
	"time"

	"google.golang.org/grpc"

	"modelyard.dev/client/modelyard"
	pb "modelyard.dev/client/modelyardv1"
)

func main() {
	log.SetFlags(0)
	if len(os.Args) != 4 {
		log.Fatal("usage: example HOST:PORT KEY TEXT")
	}
	if err := ask(os.Args[1], os.Args[2], os.Args[3]); err != nil {
		details := modelyard.DetailsOf(err)
		log.Fatal(details.Code, " ", details.Reason, " ", details.Violations, ": ", err)
	}
}

func ask(target, key, text string) error {
	connection, err := modelyard.Dial(target, grpc.WithInsecure())
	if err != nil {
		return err
	}
	defer connection.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	answer, err := connection.Inference.Predict(ctx, &pb.PredictRequest{
		Key: key,
		Inputs: []*pb.Tensor{{
			DataType: pb.DataType_DATA_TYPE_TEXT,
			Shape:    []int64{1},
			Content:  &pb.Tensor_Text{Text: &pb.TextElements{Values: []string{text}}},
		}},
	})
	if err != nil {
		return err
	}
	for _, output := range answer.Outputs {
		if values := output.GetText().GetValues(); values != nil {
			fmt.Println(output.Name, values)
		}
	}
	fmt.Println("served by", answer.Served.Model, "on", answer.Served.Device)
	return nil
}
