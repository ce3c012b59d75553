package jobs

import (
	"context"
	"errors"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nnsight-go/nnsight-go/engine/fault"
)

// Embedded is a NATS server inside this process.
type Embedded struct{ server *server.Server }

// Embed starts a NATS server that keeps everything in a directory. With an address, "host:port", workers
// in other processes can reach it, with the token if there is one.
func Embed(dir, host string, port int, token string) (*Embedded, error) {
	o := &server.Options{ServerName: "nnsight-go", JetStream: true, StoreDir: dir, DontListen: host == "",
		Host: host, Port: port, Authorization: token, NoSigs: true, NoLog: true}
	s, err := server.NewServer(o)
	if err != nil {
		return nil, fault.New(fault.Remote, "the queue cannot be started: %v", err)
	}
	s.Start()
	if !s.ReadyForConnections(30 * time.Second) {
		s.Shutdown()
		return nil, fault.New(fault.Remote, "the queue in %s does not start", dir).
			WithHint("Is another server at work in that directory, or on that port?")
	}
	return &Embedded{s}, nil
}

// Connect connects to the server inside this process.
func (e *Embedded) Connect(token string) (*nats.Conn, error) {
	return nats.Connect("", nats.InProcessServer(e.server), nats.Token(token), nats.MaxReconnects(-1))
}

// URL is where other processes reach it.
func (e *Embedded) URL() string { return e.server.ClientURL() }

// Close stops the server. What it keeps is on disk.
func (e *Embedded) Close() {
	e.server.Shutdown()
	e.server.WaitForShutdown()
}

// Connect connects to a NATS server or cluster.
func Connect(urls string) (*nats.Conn, error) {
	nc, err := nats.Connect(urls, nats.MaxReconnects(-1), nats.ReconnectWait(500*time.Millisecond))
	if err != nil {
		return nil, fault.New(fault.Remote, "the queue at %s cannot be reached: %v", redacted(urls), err)
	}
	return nc, nil
}

// redacted is a list of addresses without what they hold of passwords.
func redacted(urls string) string {
	var out []string
	for one := range strings.SplitSeq(urls, ",") {
		if u, err := url.Parse(strings.TrimSpace(one)); err == nil {
			out = append(out, u.Redacted())
		}
	}
	return strings.Join(out, ",")
}

// settling is for how long something is tried again while a cluster finds its leaders.
const settling, settlingPause = time.Minute, 250 * time.Millisecond

// settled does something again that fails because the queue does not answer now, which passes.
func (s *Store) settled(ctx context.Context, f func() error) error {
	began := time.Now()
	for {
		err := f()
		if err == nil || !passing(err) || ctx.Err() != nil || time.Since(began) > settling {
			return err
		}
		if time.Since(began) > settling/4 {
			s.reconnect()
		}
		select {
		case <-time.After(settlingPause):
		case <-ctx.Done():
			return err
		}
	}
}

// reconnect makes the connection anew, once in a while: now and then a cluster does not pass on what one connection asks,
// or what it is answered, for as long as that lasts.
func (s *Store) reconnect() {
	now, last := time.Now().UnixNano(), s.reconnected.Load()
	if now-last > int64(settling/4) && s.reconnected.CompareAndSwap(last, now) {
		_ = s.nc.ForceReconnect() // it goes on as it was where that cannot be
	}
}

// asked is settled of what gives something.
func asked[T any](ctx context.Context, s *Store, f func() (T, error)) (out T, err error) {
	err = s.settled(ctx, func() (err error) {
		out, err = f()
		return err
	})
	return out, err
}

// passing reports whether an error of the queue's says nothing about what it was asked.
func passing(err error) bool {
	var api *jetstream.APIError
	if errors.As(err, &api) {
		return api.Code == http.StatusServiceUnavailable
	}
	return errors.Is(err, context.DeadlineExceeded) || errors.Is(err, nats.ErrTimeout) || errors.Is(err, nats.ErrNoResponders) ||
		errors.Is(err, jetstream.ErrNoStreamResponse) || errors.Is(err, nats.ErrDisconnected) || errors.Is(err, nats.ErrConnectionReconnecting)
}
