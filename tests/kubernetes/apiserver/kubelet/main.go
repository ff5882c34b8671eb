// The exec half of a kubelet, for the tests: what kube-apiserver proxies pods/exec to. Streams are Kubernetes' own
// (k8s.io/cri-streaming, as container runtimes serve them); where a runtime would enter a container, this runs the
// command as a process of this machine. Every container of every pod is this machine; nothing is authenticated.
//
// usage: kubelet CERT KEY, listens on a free port of 127.0.0.1 and prints it
package main

import (
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/exec"
	"time"

	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	utilexec "k8s.io/utils/exec"
)

type machine struct{}

// ExecInContainer implements remotecommand.Executor. As in a real container, the process outlives a connection that
// is cut; who started this program ends its process group.
func (machine) ExecInContainer(_ context.Context, pod, _, container string, argv []string, in io.Reader, out, errors io.WriteCloser, _ bool, _ <-chan remotecommand.TerminalSize, _ time.Duration) error {
	command := exec.Command(argv[0], argv[1:]...)
	command.Env = append(os.Environ(), "POD="+pod, "CONTAINER="+container)
	command.WaitDelay = time.Second
	command.Stdin, command.Stdout, command.Stderr = in, out, errors
	err := command.Run()
	if ended, ok := err.(*exec.ExitError); ok && ended.Exited() {
		return utilexec.CodeExitError{Err: err, Code: ended.ExitCode()}
	}
	return err
}

func serve(w http.ResponseWriter, r *http.Request) {
	options, err := remotecommand.NewOptions(r)
	argv := r.URL.Query()["command"]
	if err != nil || len(argv) == 0 {
		http.Error(w, fmt.Sprintf("no command or no streams: %v", err), http.StatusBadRequest)
		return
	}
	remotecommand.ServeExec(w, r, machine{}, r.PathValue("pod"), "", r.PathValue("container"), argv, options,
		time.Minute, remotecommand.DefaultStreamCreationTimeout, remotecommand.SupportedStreamingProtocols)
}

func main() {
	http.HandleFunc("/exec/{namespace}/{pod}/{container}", serve)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(listener.Addr().(*net.TCPAddr).Port)
	log.Fatal(http.ServeTLS(listener, nil, os.Args[1], os.Args[2]))
}
