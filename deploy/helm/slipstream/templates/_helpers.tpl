{{- define "slipstream.name" -}}
{{- if contains "slipstream" .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-slipstream" (.Release.Name | trunc 39 | trimSuffix "-") -}}
{{- end -}}
{{- end -}}

{{- define "slipstream.selector" -}}
app.kubernetes.io/name: slipstream
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "slipstream.labels" -}}
{{ include "slipstream.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "slipstream.image" -}}
{{- if not .Values.image.repository -}}
{{- fail "image.repository is empty. No image is published: build one (docker build --tag REPOSITORY:cpu .), push it where the cluster can pull it, and set image.repository" -}}
{{- end -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (.Values.image.tag | default (ternary "cuda" "cpu" (gt (int .Values.gpu.count) 0))) -}}
{{- end -}}
{{- end -}}

{{/* A setting as an environment variable's text: lists with commas, whole numbers without an exponent. */}}
{{- define "slipstream.setting" -}}
{{- if kindIs "slice" . -}}
{{- join "," . -}}
{{- else if and (kindIs "float64" .) (eq (floor .) .) -}}
{{- int64 . -}}
{{- else -}}
{{- toString . -}}
{{- end -}}
{{- end -}}

{{/* Series of this release alone, as the PodMonitor labels them. */}}
{{- define "slipstream.series" -}}
namespace="{{ .Release.Namespace }}",pod=~"{{ include "slipstream.name" . }}-[a-z0-9]+-[a-z0-9]+"
{{- end -}}

{{/* Empty, or why one volume can have only one pod. */}}
{{- define "slipstream.single" -}}
{{- if .Values.data.enabled -}}
data.enabled: one server has the store; for several put a PostgreSQL into secret.jobsUrl
{{- else if and (or .Values.cache.persistent .Values.cache.existingClaim) (not (has "ReadWriteMany" .Values.cache.accessModes)) -}}
cache: the volume is not ReadWriteMany (cache.accessModes)
{{- end -}}
{{- end -}}

{{/* What does not go together, said before anything is applied. */}}
{{- define "slipstream.check" -}}
{{- $v := .Values -}}
{{- $deadline := float64 (dig "deadline_seconds" 600 $v.settings) -}}
{{- $drain := float64 (dig "drain_seconds" 60 $v.settings) -}}
{{- if ge $deadline $drain -}}
{{- fail (printf "settings.drain_seconds (%v) has to be above settings.deadline_seconds (%v): what is accepted may finish" $drain $deadline) -}}
{{- end -}}
{{- $single := include "slipstream.single" . -}}
{{- if and $single (or (gt (int $v.replicas) 1) (ne $v.autoscaling.kind "none")) -}}
{{- fail (printf "several replicas (replicas, autoscaling.kind), but %s" $single) -}}
{{- end -}}
{{- if gt (int $v.autoscaling.minReplicas) (int $v.autoscaling.maxReplicas) -}}
{{- fail "autoscaling.minReplicas is above autoscaling.maxReplicas" -}}
{{- end -}}
{{- if and (not $v.secret.name) (or $v.secret.apiKeys $v.secret.adminKey $v.secret.jobsUrl $v.secret.webhookSecret $v.secret.hfToken) -}}
{{- fail "secret.name is empty, but keys of it are named" -}}
{{- end -}}
{{- if and $v.secret.name (not (or $v.secret.apiKeys $v.secret.adminKey $v.secret.jobsUrl $v.secret.webhookSecret $v.secret.hfToken)) -}}
{{- fail "secret.name is set, but none of its keys: secret.apiKeys, adminKey, jobsUrl, webhookSecret, hfToken" -}}
{{- end -}}
{{- if and $v.podMonitor.enabled $v.settings.metrics_require_key (not $v.podMonitor.authorization) -}}
{{- fail "settings.metrics_require_key is true: Prometheus needs podMonitor.authorization" -}}
{{- end -}}
{{- if and $v.ingress.enabled (not $v.ingress.hosts) -}}
{{- fail "ingress.enabled is true: name the hosts in ingress.hosts" -}}
{{- end -}}
{{- end -}}

{{/* A claim: (list context volume suffix). */}}
{{- define "slipstream.claim" -}}
{{- $top := index . 0 -}}{{- $volume := index . 1 -}}
apiVersion: v1
kind: PersistentVolumeClaim
metadata:
  name: {{ include "slipstream.name" $top }}-{{ index . 2 }}
  labels: {{- include "slipstream.labels" $top | nindent 4 }}
  annotations:
    helm.sh/resource-policy: keep # helm uninstall does not delete what was stored
spec:
  accessModes: {{- toYaml $volume.accessModes | nindent 4 }}
  {{- with $volume.storageClass }}
  storageClassName: {{ . | quote }}
  {{- end }}
  resources:
    requests:
      storage: {{ $volume.size | quote }}
{{- end -}}
