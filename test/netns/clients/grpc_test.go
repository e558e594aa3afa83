package clients

import (
	"context"
	"crypto/rand"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/interop"
	service "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// TestGRPC runs gRPC's interoperability tests (github.com/grpc/grpc/blob/master/doc/interop-test-descriptions.md) from
// its own client by https to its own server by h2c. They end the process where one fails.
func TestGRPC(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	service.RegisterTestServiceServer(s, slow{interop.NewTestServer()})
	go s.Serve(ln)
	t.Cleanup(s.Stop)
	h := start(t, "forward: "+ln.Addr().String()+", upstream: { protocol: h2c }")
	cc, err := grpc.NewClient("passthrough:///"+h.addr, grpc.WithTransportCredentials(credentials.NewTLS(h.tls)), grpc.WithAuthority(site))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close() })
	c := service.NewTestServiceClient(cc)
	for _, test := range []struct {
		name string
		run  func(context.Context, service.TestServiceClient, ...grpc.CallOption)
	}{
		{"empty unary", interop.DoEmptyUnaryCall},
		{"large unary", interop.DoLargeUnaryCall},
		{"client streaming", interop.DoClientStreaming},
		{"server streaming", interop.DoServerStreaming},
		{"ping pong", interop.DoPingPong},
		{"empty stream", interop.DoEmptyStream},
		{"timeout on sleeping server", interop.DoTimeoutOnSleepingServer},
		{"cancel after begin", interop.DoCancelAfterBegin},
		{"cancel after first response", interop.DoCancelAfterFirstResponse},
		{"custom metadata", interop.DoCustomMetadata}, // header and trailer, binary too
		{"status code and message", interop.DoStatusCodeAndMessage},
		{"special status message", interop.DoSpecialStatusMessage},
		{"unimplemented", func(ctx context.Context, _ service.TestServiceClient, _ ...grpc.CallOption) {
			interop.DoUnimplementedMethod(ctx, cc)
			interop.DoUnimplementedService(ctx, service.NewUnimplementedServiceClient(cc))
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			test.run(ctx, c)
		})
	}
	t.Run("trailers after an error in the middle", func(t *testing.T) { trailers(t, c) })
	t.Run("deadline", func(t *testing.T) { deadline(t, c) })
}

// slow is the interoperability server, with a call that waits for its client to give up, and tells of it.
type slow struct{ service.TestServiceServer }

var gaveUp = make(chan error, 1)

func (s slow) UnaryCall(ctx context.Context, r *service.SimpleRequest) (*service.SimpleResponse, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	if md.Get("wait") == nil {
		return s.TestServiceServer.UnaryCall(ctx, r)
	}
	if _, ok := ctx.Deadline(); !ok {
		gaveUp <- status.Error(codes.FailedPrecondition, "the deadline was lost on the way")
		return nil, nil
	}
	<-ctx.Done()
	gaveUp <- ctx.Err()
	return nil, ctx.Err()
}

// deadline checks that the server hears of a client's deadline, and of a client that gives up.
func deadline(t *testing.T, c service.TestServiceClient) {
	for d := 300 * time.Millisecond; d < time.Minute; d *= 4 { // the machine may be too busy for the call to arrive at all
		ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(t.Context(), "wait", "1"), d)
		_, err := c.UnaryCall(ctx, &service.SimpleRequest{})
		cancel()
		if status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("client: %v", err)
		}
		select {
		case err := <-gaveUp:
			if status.Code(err) == codes.FailedPrecondition {
				t.Error(err)
			}
			return
		case <-time.After(5 * time.Second):
		}
	}
	t.Error("the server never heard of the call, or of its end")
}

// trailers has a stream fail after some messages, both ways busy.
func trailers(t *testing.T, c service.TestServiceClient) {
	ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(t.Context(), "x-grpc-test-echo-trailing-bin", "\x00\xff"), time.Minute)
	defer cancel()
	stream, err := c.FullDuplexCall(ctx)
	if err != nil {
		t.Fatal(err)
	}
	payload := make([]byte, 100<<10)
	rand.Read(payload)
	for range 20 {
		if err := stream.Send(&service.StreamingOutputCallRequest{ResponseParameters: []*service.ResponseParameters{{Size: 70 << 10}}, Payload: &service.Payload{Body: payload}}); err != nil {
			t.Fatal(err)
		}
		m, err := stream.Recv()
		if err != nil || len(m.GetPayload().GetBody()) != 70<<10 {
			t.Fatalf("%d bytes, %v", len(m.GetPayload().GetBody()), err)
		}
	}
	why := strings.Repeat("why ", 200) + "\t☺"
	if err := stream.Send(&service.StreamingOutputCallRequest{ResponseStatus: &service.EchoStatus{Code: int32(codes.Aborted), Message: why}}); err != nil {
		t.Fatal(err)
	}
	_, err = stream.Recv()
	if st := status.Convert(err); err == io.EOF || st.Code() != codes.Aborted || st.Message() != why {
		t.Errorf("%v", err)
	}
	if got := stream.Trailer().Get("x-grpc-test-echo-trailing-bin"); len(got) != 1 || got[0] != "\x00\xff" {
		t.Errorf("trailer %q", got)
	}
}
