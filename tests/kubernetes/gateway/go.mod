// Where the tests take the definitions of the Gateway API from: config/crd of this module, which is compiled nowhere.
module alertmedic.invalid/tests/kubernetes/gateway

go 1.26.0

require sigs.k8s.io/gateway-api v1.6.0
