{{/* What the hosts are called: as in shim/deploy for the release `mailroom`, so that others can stand beside it. */}}
{{- define "mailroom.hosts" -}}
{{- if eq .Release.Name "mailroom" }}triage{{ else }}{{ .Release.Name }}-triage{{ end }}
{{- end }}

{{/* What the Job is called. A Job cannot change, so every upgrade has one of its own. */}}
{{- define "mailroom.provision" -}}
{{- $name := printf "%s-provision" .Release.Name -}}
{{- if .Release.IsUpgrade }}{{ printf "%s-%d" (trunc 52 $name | trimSuffix "-") .Release.Revision }}{{ else }}{{ $name }}{{ end }}
{{- end }}

{{/* The server that KEDA asks, if it is ours. */}}
{{- define "mailroom.scaler" -}}
{{- if and .Values.keda.enabled (eq .Values.keda.trigger "external-push") }}{{ .Release.Name }}-scaler{{ end }}
{{- end }}

{{/* Helm's labels, which shim/deploy has not. */}}
{{- define "mailroom.release" -}}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version | replace "+" "_" }}
{{- end }}

{{/* The labels of everything that every cluster needs. */}}
{{- define "mailroom.labels" -}}
app.kubernetes.io/name: mailroom
app.kubernetes.io/part-of: mailroom
{{ include "mailroom.release" . }}
{{- end }}

{{/* The labels of its pods: without the chart's version, with which all of them would be made anew. */}}
{{- define "mailroom.podLabels" -}}
app.kubernetes.io/name: mailroom
app.kubernetes.io/part-of: mailroom
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* The labels by which this release's hosts are found. */}}
{{- define "mailroom.selector" -}}
app.kubernetes.io/component: triage
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* The reference to an image. */}}
{{- define "mailroom.image" -}}
{{ .repository }}{{ with .digest }}@{{ . }}{{ else }}{{ with .tag }}:{{ . }}{{ end }}{{ end }}
{{- end }}

{{/* The labels of nodes that carry the shim. */}}
{{- define "mailroom.nodes" -}}
{{- if .Values.runtimeClass.nodeSelector }}
{{- toYaml .Values.runtimeClass.nodeSelector }}
{{- else if .Values.node.enabled -}}
kubernetes.io/os: linux
kubernetes.io/arch: amd64
{{- else -}}
mailroom: enabled
{{- end }}
{{- end }}

{{/* What all programs of this namespace read. */}}
{{- define "mailroom.settings" -}}
{{- $elsewhere := dict "MAILROOM_SERVER" "the value server" "MAILROOM_SHARDS" "the value shards" "MAILROOM_LISTEN" "the probes" }}
{{- range $name, $other := $elsewhere }}
{{- if hasKey $.Values.settings $name }}
{{- fail (printf "settings.%s: %s decides that" $name $other) }}
{{- end }}
{{- end }}
{{- $given := dict "MAILROOM_SERVER" .Values.server }}
{{- if .Values.credentials.secret }}
{{- $_ := set $given "MAILROOM_CREDS" "/etc/nats/host.creds" }}
{{- end }}
{{- if .Values.tls.secret }}
{{- $_ := set $given "MAILROOM_TLS_CA" "/etc/nats-tls/ca.crt" }}
{{- end }}
{{- if .Values.tls.client }}
{{- $_ := required "tls.client is for tls.secret, which has the certificate: give both" .Values.tls.secret }}
{{- $_ := set $given "MAILROOM_TLS_CERT" "/etc/nats-tls/tls.crt" }}
{{- $_ := set $given "MAILROOM_TLS_KEY" "/etc/nats-tls/tls.key" }}
{{- end }}
{{- merge $given .Values.settings | toYaml }}
{{- end }}

{{/* The first part of every pod of this namespace: no token, no variables that other people's Services make, no root. */}}
{{- define "mailroom.pod" -}}
serviceAccountName: {{ .Release.Name }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 65532
  runAsGroup: 65532
  seccompProfile:
    type: RuntimeDefault
{{- end }}

{{/* What every container of this namespace may do: nothing more than run. */}}
{{- define "mailroom.confined" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* How the kubelet asks a container how it is. */}}
{{- define "mailroom.probes" -}}
readinessProbe:
  httpGet:
    path: /readyz
    port: admin
  periodSeconds: 2
livenessProbe:
  httpGet:
    path: /livez
    port: admin
  periodSeconds: 10
  failureThreshold: 6
{{- end }}

{{/* The Secrets of `credentials` and `tls`: a list of volumes. */}}
{{- define "mailroom.volumes" -}}
{{- with .Values.credentials.secret }}
- name: nats
  secret:
    secretName: {{ . }}
{{- end }}
{{- with .Values.tls.secret }}
- name: nats-tls
  secret:
    secretName: {{ . }}
{{- end }}
{{- end }}

{{/* Where those are mounted: a list. */}}
{{- define "mailroom.volumeMounts" -}}
{{- if .Values.credentials.secret }}
- name: nats
  mountPath: /etc/nats
  readOnly: true
{{- end }}
{{- if .Values.tls.secret }}
- name: nats-tls
  mountPath: /etc/nats-tls
  readOnly: true
{{- end }}
{{- end }}

{{/* What pods may reach: the servers, and names. */}}
{{- define "mailroom.egress" -}}
- ports:
    {{- range .Values.networkPolicy.serverPorts }}
    - port: {{ int . }}
      protocol: TCP
    {{- end }}
- ports:
    - port: 53
      protocol: UDP
    - port: 53
      protocol: TCP
{{- end }}
