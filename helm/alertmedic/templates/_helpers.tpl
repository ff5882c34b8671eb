{{- define "alertmedic.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "alertmedic.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "alertmedic.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "alertmedic.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "alertmedic.selector" -}}
app.kubernetes.io/name: {{ include "alertmedic.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "alertmedic.labels" -}}
{{ include "alertmedic.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "alertmedic.serviceAccount" -}}
{{- default (include "alertmedic.fullname" .) .Values.serviceAccount.name -}}
{{- end -}}

{{- define "alertmedic.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end -}}
{{- end -}}

{{- define "alertmedic.scheme" -}}
{{- if .Values.tls.secret }}https{{ else }}http{{ end -}}
{{- end -}}

{{/* "true" where anything of the API server is used: only then does the pod get a token. */}}
{{- define "alertmedic.usesApi" -}}
{{- $used := or .Values.kubernetes.evidence .Values.kubernetes.nodes -}}
{{- range $name, $on := .Values.kubernetes.actions }}{{ if $on }}{{ $used = true }}{{ end }}{{ end -}}
{{- if $used }}true{{ end -}}
{{- end -}}

{{/* "true" where an action in namespaces is on. */}}
{{- define "alertmedic.acts" -}}
{{- $acts := false -}}
{{- range $name, $on := .Values.kubernetes.actions }}{{ if and $on (not (has $name (list "cordon" "drain"))) }}{{ $acts = true }}{{ end }}{{ end -}}
{{- if $acts }}true{{ end -}}
{{- end -}}

{{- define "alertmedic.namespaces" -}}
{{- default (list .Release.Namespace) .Values.kubernetes.namespaces | uniq | sortAlpha | toJson -}}
{{- end -}}

{{/* Rules of a Role in a namespace that is looked at and acted in. */}}
{{- define "alertmedic.rules" -}}
{{- $k := .Values.kubernetes -}}
{{- $a := $k.actions -}}
{{- if $k.evidence }}
- apiGroups: [""]
  resources: [pods, events, services, persistentvolumeclaims]
  verbs: [get, list, watch]
- apiGroups: [apps]
  resources: [deployments, replicasets, statefulsets, daemonsets]
  verbs: [get, list, watch]
- apiGroups: [batch]
  resources: [jobs, cronjobs]
  verbs: [get, list, watch]
- apiGroups: [autoscaling]
  resources: [horizontalpodautoscalers]
  verbs: [get, list, watch]
- apiGroups: [discovery.k8s.io]
  resources: [endpointslices]
  verbs: [get, list, watch]
{{- end }}
{{- if or $a.rolloutRestart $a.rolloutUndo $a.scale $a.setResources $a.annotate }}
- apiGroups: [""]
  resources: [pods]
  verbs: [get]
- apiGroups: [apps]
  resources: [replicasets]
  verbs: [get]
- apiGroups: [apps]
  resources: [deployments, statefulsets, daemonsets]
  verbs: [get, patch]
{{- end }}
{{- if $a.rolloutUndo }}
- apiGroups: [apps]
  resources: [replicasets, controllerrevisions]
  verbs: [get, list]
{{- end }}
{{- if $a.evictPod }}
- apiGroups: [""]
  resources: [pods]
  verbs: [get]
- apiGroups: [""]
  resources: [pods/eviction]
  verbs: [create]
{{- end }}
{{- if $a.hpaBounds }}
- apiGroups: [autoscaling]
  resources: [horizontalpodautoscalers]
  verbs: [get, patch]
{{- end }}
{{- if $a.suspendCronjob }}
- apiGroups: [batch]
  resources: [cronjobs]
  verbs: [get, patch]
{{- end }}
{{- if $a.setConfig }}
- apiGroups: [""]
  resources: [configmaps]
  resourceNames: {{ sortAlpha $k.setConfigNames | toJson }}
  verbs: [get, patch]
{{- end }}
{{- if $a.capture }}
- apiGroups: [""]
  resources: [pods, pods/log]
  verbs: [get]
- apiGroups: [""]
  resources: [events]
  verbs: [list]
{{- end }}
{{- if $a.diagnose }}
- apiGroups: [""]
  resources: [pods]
  verbs: [get]
# A WebSocket begins with a GET, which is `get` here; from Kubernetes 1.35 on the server asks for `create` as well.
- apiGroups: [""]
  resources: [pods/exec]
  verbs: [get, create]
{{- end }}
{{- end -}}

{{/* Rules of the ClusterRole for nodes. */}}
{{- define "alertmedic.nodeRules" -}}
{{- $k := .Values.kubernetes -}}
{{- if $k.nodes }}
- apiGroups: [""]
  resources: [nodes]
  verbs: [get, list, watch]
{{- end }}
{{- if or $k.actions.cordon $k.actions.drain }}
- apiGroups: [""]
  resources: [nodes]
  verbs: [get, patch]
{{- end }}
{{- if $k.actions.drain }}
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list]
- apiGroups: [""]
  resources: [pods/eviction]
  verbs: [create]
{{- end }}
{{- end -}}

{{/* The whole alertmedic.yaml. */}}
{{- define "alertmedic.config" -}}
{{- $bearer := list -}}
{{- range .Values.auth.tokens }}
{{- $bearer = append $bearer (dict "name" .name "token_file" (printf "/etc/alertmedic/tokens/%s" .name) "scopes" .scopes) }}
{{- end -}}
{{- $base := dict
  "listen" "0.0.0.0:9095"
  "state_dir" "/var/lib/alertmedic"
  "shutdown_seconds" (sub .Values.terminationGracePeriodSeconds 30)
  "sandbox" (dict "protection" .Values.sandbox.mode)
  "log" (dict "format" "json")
  "packs" (dict "dirs" list)
  "actions" (dict "dirs" list)
-}}
{{- if $bearer }}{{ $_ := set $base "auth" (dict "bearer" $bearer) }}{{ end -}}
{{- if .Values.tls.secret }}
{{- $_ := set $base "listen_tls" (dict "cert_file" "/etc/alertmedic/tls/tls.crt" "key_file" "/etc/alertmedic/tls/tls.key") }}
{{- end -}}
{{- if .Values.prometheus.url }}
{{- $prometheus := dict "url" .Values.prometheus.url }}
{{- if .Values.prometheus.tokenSecret }}{{ $_ := set $prometheus "bearer_token_file" "/etc/alertmedic/prometheus/token" }}{{ end }}
{{- $_ := set $base "prometheus" $prometheus }}
{{- end -}}
{{- if .Values.alertmanager.url }}
{{- $alertmanager := dict "url" .Values.alertmanager.url }}
{{- if .Values.alertmanagerConfig.enabled }}
{{- /* The operator names a receiver NAMESPACE/OBJECT/RECEIVER; older ones have dashes between. */}}
{{- $_ := set $alertmanager "receivers" (dict (printf "%s?%s?alertmedic" .Release.Namespace (include "alertmedic.fullname" .)) "default") }}
{{- end }}
{{- $_ := set $base "alertmanager" $alertmanager }}
{{- end -}}
{{- $packs := list -}}
{{- if .Values.extraPacks }}{{ $packs = append $packs "/etc/alertmedic/packs/own" }}{{ end -}}
{{- range .Values.extraPackConfigMaps }}{{ $packs = append $packs (printf "/etc/alertmedic/packs/%s" .) }}{{ end -}}
{{- $_ := set $base.packs "dirs" $packs -}}
{{- $actions := list -}}
{{- if .Values.extraActions }}{{ $actions = append $actions "/etc/alertmedic/actions/own" }}{{ end -}}
{{- range .Values.extraActionConfigMaps }}{{ $actions = append $actions (printf "/etc/alertmedic/actions/%s" .) }}{{ end -}}
{{- $_ := set $base.actions "dirs" $actions -}}
{{- if include "alertmedic.usesApi" . }}
{{- $k := dict "enabled" true "evidence" .Values.kubernetes.evidence "nodes" .Values.kubernetes.nodes }}
{{- if not .Values.kubernetes.clusterWide }}{{ $_ := set $k "namespaces" (include "alertmedic.namespaces" . | fromJsonArray) }}{{ end }}
{{- if .Values.kubernetes.actions.diagnose }}{{ $_ := set $k "diagnostics" .Values.kubernetes.diagnostics }}{{ end }}
{{- $_ := set $base "kubernetes" $k }}
{{- end -}}
{{- toYaml (mergeOverwrite $base (deepCopy .Values.config)) -}}
{{- end -}}
