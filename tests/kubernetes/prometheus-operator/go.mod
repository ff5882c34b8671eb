// Where the tests take the Prometheus operator's definitions from: example/prometheus-operator-crd of this module, which
// is compiled nowhere.
module alertmedic.invalid/tests/kubernetes/prometheus-operator

go 1.26.0

require github.com/prometheus-operator/prometheus-operator v0.85.0
