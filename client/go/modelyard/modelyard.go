// Package modelyard connects to a modelyard server: its stubs on one channel, retries, and what
// errors say.
package modelyard

import (
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "modelyard.dev/client/modelyardv1"
)

const maxMessageBytes = 64 << 20

// Predictions are idempotent: gRPC itself repeats them, and waits as long as the server says.
// grpc-go before 1.40 does so only with GRPC_GO_RETRY=on in its environment.
const serviceConfig = `{
  "loadBalancingConfig": [{"round_robin": {}}],
  "methodConfig": [{
    "name": [{"service": "modelyard.v1.InferenceService"}],
    "retryPolicy": {
      "maxAttempts": 4, "initialBackoff": "0.05s", "maxBackoff": "1s", "backoffMultiplier": 2,
      "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"]
    }
  }],
  "retryThrottling": {"maxTokens": 100, "tokenRatio": 0.1}
}`

// Connection has the services of one server, on one channel. It may be used by several goroutines.
type Connection struct {
	Inference   pb.InferenceServiceClient
	Models      pb.ModelServiceClient
	Routes      pb.RouteServiceClient
	Residencies pb.ResidencyServiceClient
	Admin       pb.AdminServiceClient
	channel     *grpc.ClientConn
}

// Dial makes a connection to a target, "host:port"; nothing is sent yet. The options have to say how
// the channel is secured, for instance grpc.WithInsecure().
func Dial(target string, options ...grpc.DialOption) (*Connection, error) {
	channel, err := grpc.Dial(target, append([]grpc.DialOption{
		grpc.WithDefaultServiceConfig(serviceConfig),
		grpc.WithDefaultCallOptions(
			grpc.MaxCallRecvMsgSize(maxMessageBytes), grpc.MaxCallSendMsgSize(maxMessageBytes)),
	}, options...)...)
	if err != nil {
		return nil, err
	}
	return &Connection{
		Inference:   pb.NewInferenceServiceClient(channel),
		Models:      pb.NewModelServiceClient(channel),
		Routes:      pb.NewRouteServiceClient(channel),
		Residencies: pb.NewResidencyServiceClient(channel),
		Admin:       pb.NewAdminServiceClient(channel),
		channel:     channel,
	}, nil
}

// Close closes the channel; calls under way end with an error.
func (c *Connection) Close() error { return c.channel.Close() }

// ErrorDetails is what a failed call says in its status and the details of it.
type ErrorDetails struct {
	// Code is the status code.
	Code codes.Code
	// Reason is a name of modelyardv1.ErrorReason; empty if the answer came from somebody else.
	Reason string
	// Domain is "modelyard" for errors of the server.
	Domain string
	// Metadata has what varies in the text.
	Metadata map[string]string
	// Violations are the fields that are wrong, and how.
	Violations []*errdetails.BadRequest_FieldViolation
	// Resource is what was not found, or is taken; empty where that is not the reason.
	Resource string
	// Retry says after what time a retry can help; nil if none can.
	Retry *errdetails.RetryInfo
}

// DetailsOf reads the details of what a call returned as its error.
func DetailsOf(err error) ErrorDetails {
	found := ErrorDetails{Code: status.Code(err)}
	for _, detail := range status.Convert(err).Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			found.Reason, found.Domain, found.Metadata = detail.Reason, detail.Domain, detail.Metadata
		case *errdetails.BadRequest:
			found.Violations = detail.FieldViolations
		case *errdetails.ResourceInfo:
			found.Resource = detail.ResourceName
		case *errdetails.RetryInfo:
			found.Retry = detail
		}
	}
	return found
}
