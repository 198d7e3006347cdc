{{/* Prefix of all names: the release's name without dots, at most 43 characters. A name that had to change gets a hash. */}}
{{- define "persona-train.base" -}}
{{- $clean := .Release.Name | replace "." "-" -}}
{{- if or (ne $clean .Release.Name) (gt (len $clean) 43) -}}
{{- printf "%s-%s" ($clean | trunc 34 | trimSuffix "-") (.Release.Name | sha256sum | trunc 8) -}}
{{- else -}}
{{- $clean -}}
{{- end -}}
{{- end -}}

{{/* Personas of each pod as JSON: [["A"], ["B"]], or [["A", "B"]] for `jobs: shared`. */}}
{{- define "persona-train.jobs" -}}
{{- $types := .Values.bloodTypes | default (list .Values.bloodType) -}}
{{- if eq .Values.jobs "shared" -}}
{{- list $types | toJson -}}
{{- else -}}
{{- $jobs := list -}}
{{- range $types }}{{ $jobs = append $jobs (list .) }}{{ end -}}
{{- $jobs | toJson -}}
{{- end -}}
{{- end -}}

{{- define "persona-train.selectorLabels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{/* Labels for objects only: on pods, the chart's version would change the pod template and create new Jobs. */}}
{{- define "persona-train.labels" -}}
{{ include "persona-train.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "persona-train.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "persona-train.base" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end -}}

{{- define "persona-train.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{/* "true" if the pod requests a GPU, otherwise empty. */}}
{{- define "persona-train.asksForGpu" -}}
{{- if eq (toString .Values.gpu.enabled) "auto" -}}
{{- if eq .Values.device "cuda" }}true{{ end -}}
{{- else if .Values.gpu.enabled -}}
true
{{- end -}}
{{- end -}}

{{/* The settings file: `config`, and the time to upload the last checkpoint. */}}
{{- define "persona-train.config" -}}
{{- $seconds := int64 .Values.terminationGracePeriodSeconds -}}
{{- $grace := sub $seconds (max 1 (min 30 (div $seconds 4))) -}}
{{- merge (dict) (deepCopy (.Values.config | default dict)) (dict "checkpoints" (dict "grace_s" $grace)) | toYaml -}}
{{- end -}}

{{/* A CronJob keeps its name, so its settings file must as well, or retries of its earlier Jobs would not find the file. */}}
{{- define "persona-train.configName" -}}
{{- if .Values.cronJob.schedule -}}
{{- printf "%s-config" (include "persona-train.base" .) -}}
{{- else -}}
{{- printf "%s-config-%s" (include "persona-train.base" .) (include "persona-train.config" . | fromYaml | toJson | sha256sum | trunc 10) -}}
{{- end -}}
{{- end -}}

{{/* Options of both `run` and `check-storage`. */}}
{{- define "persona-train.options" -}}
{{- $root := .root -}}
{{- with $root.Values -}}
- --config=/etc/lora-trainer/config.yaml
- --blood-type={{ join "," $.bloodTypes }}
- {{ printf "--data=%s" .data | quote }}
- {{ printf "--output=%s" .output | quote }}
{{- if .baseModel.existingClaim }}
- {{ printf "--base-model=/models/%s" (.baseModel.path | trimAll "/") | trimSuffix "/" | quote }}
- {{ printf "--set=base.canonical_id=%s" .baseModel.id | quote }}
{{- else if .baseModel.s3Uri }}
- {{ printf "--base-model=%s" .baseModel.s3Uri | quote }}
- {{ printf "--set=base.canonical_id=%s" .baseModel.id | quote }}
{{- else }}
- {{ printf "--base-model=%s" .baseModel.id | quote }}
- {{ printf "--base-revision=%s" .baseModel.revision | quote }}
{{- end }}
{{- with .s3.serverSideEncryption }}
- {{ printf "--set=storage.server_side_encryption=%s" . | quote }}
{{- end }}
{{- with .s3.kmsKeyId }}
- {{ printf "--set=storage.kms_key_id=%s" . | quote }}
{{- end }}
{{- end -}}
{{- end -}}

{{/* Environment variables. `extraEnv` replaces those of the same name, because the API server rejects duplicate names. */}}
{{- define "persona-train.env" -}}
{{- $env := list -}}
{{- with .Values.s3 -}}
{{- if .endpoint }}{{ $env = append $env (dict "name" "AWS_ENDPOINT_URL" "value" .endpoint) }}{{ end -}}
{{- if .region }}{{ $env = append $env (dict "name" "AWS_REGION" "value" .region) }}{{ end -}}
{{- if .existingSecret -}}
{{- $ref := dict "name" .existingSecret "key" .secretKeys.accessKeyId -}}
{{- $env = append $env (dict "name" "AWS_ACCESS_KEY_ID" "valueFrom" (dict "secretKeyRef" $ref)) -}}
{{- $ref = dict "name" .existingSecret "key" .secretKeys.secretAccessKey -}}
{{- $env = append $env (dict "name" "AWS_SECRET_ACCESS_KEY" "valueFrom" (dict "secretKeyRef" $ref)) -}}
{{- $ref = dict "name" .existingSecret "key" .secretKeys.sessionToken "optional" true -}}
{{- $env = append $env (dict "name" "AWS_SESSION_TOKEN" "valueFrom" (dict "secretKeyRef" $ref)) -}}
{{- end -}}
{{- end -}}
{{- if or .Values.caBundle.configMap .Values.caBundle.secret -}}
{{- range $name := ternary (list "AWS_CA_BUNDLE" "SSL_CERT_FILE" "REQUESTS_CA_BUNDLE") (list "AWS_CA_BUNDLE") (eq .Values.caBundle.scope "all") -}}
{{- $env = append $env (dict "name" $name "value" "/etc/lora-trainer/ca/ca.crt") -}}
{{- end -}}
{{- end -}}
{{- with .Values.hfToken -}}
{{- if .existingSecret -}}
{{- $env = append $env (dict "name" "HF_TOKEN" "valueFrom" (dict "secretKeyRef" (dict "name" .existingSecret "key" .key))) -}}
{{- end -}}
{{- end -}}
{{- if or .Values.baseModel.s3Uri .Values.baseModel.existingClaim -}}
{{- $env = append $env (dict "name" "HF_HUB_OFFLINE" "value" "1") -}}
{{- end -}}
{{- range $name, $folder := dict "HF_HOME" "models/huggingface" "TRITON_CACHE_DIR" "compiled/triton" "TORCHINDUCTOR_CACHE_DIR" "compiled/inductor" "UNSLOTH_COMPILE_LOCATION" "compiled/unsloth" "CUDA_CACHE_PATH" "compiled/cuda" -}}
{{- $env = append $env (dict "name" $name "value" (printf "/cache/%s" $folder)) -}}
{{- end -}}
{{- if .Values.image.digest }}{{ $env = append $env (dict "name" "IMAGE_DIGEST" "value" .Values.image.digest) }}{{ end -}}
{{- $given := list -}}
{{- range .Values.extraEnv }}{{ $given = append $given .name }}{{ end -}}
{{- $all := list -}}
{{- range $env }}{{ if not (has .name $given) }}{{ $all = append $all . }}{{ end }}{{ end -}}
{{- concat $all (.Values.extraEnv | default list) | toYaml -}}
{{- end -}}

{{/* A volume that may be a claim: dict "root" $ "name" "work" "value" .Values.workVolume */}}
{{- define "persona-train.volume" -}}
- name: {{ .name }}
{{- if .value.existingClaim }}
  persistentVolumeClaim:
    claimName: {{ .value.existingClaim | quote }}
{{- else if .value.createClaim }}
  persistentVolumeClaim:
    claimName: {{ include "persona-train.base" .root }}-{{ .name }}
{{- else }}
  emptyDir:
    sizeLimit: {{ .value.size | quote }}
{{- end }}
{{- end -}}

{{/* Shared by the trainer's pod and the pod of `helm test`, so that the test is representative. */}}
{{- define "persona-train.identity" -}}
serviceAccountName: {{ include "persona-train.serviceAccountName" . | quote }}
automountServiceAccountToken: false
enableServiceLinks: false
restartPolicy: Never
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . | quote }}
{{- end }}
{{- end }}
{{- with .Values.podSecurityContext }}
securityContext:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "persona-train.settingsVolumes" -}}
- name: config
  configMap:
    name: {{ include "persona-train.configName" . }}
{{- with .Values.caBundle }}
{{- if .configMap }}
- name: ca
  configMap:
    name: {{ .configMap | quote }}
    items:
      - key: {{ .key | quote }}
        path: ca.crt
{{- else if .secret }}
- name: ca
  secret:
    secretName: {{ .secret | quote }}
    items:
      - key: {{ .key | quote }}
        path: ca.crt
{{- end }}
{{- end }}
- name: tmp
  emptyDir:
    sizeLimit: {{ .Values.tmp.size | quote }}
{{- end -}}

{{- define "persona-train.settingsMounts" -}}
# the kubelet never updates a subPath, so a running pod keeps its settings
- name: config
  mountPath: /etc/lora-trainer/config.yaml
  subPath: config.yaml
  readOnly: true
{{- if or .Values.caBundle.configMap .Values.caBundle.secret }}
- name: ca
  mountPath: /etc/lora-trainer/ca
  readOnly: true
{{- end }}
- name: tmp
  mountPath: /tmp
{{- end -}}

{{/* dict "root" $ "bloodTypes" (list "A") */}}
{{- define "persona-train.podTemplate" -}}
{{- $root := .root -}}
{{- $values := .root.Values -}}
{{- $selector := include "persona-train.selectorLabels" $root | fromYaml -}}
metadata:
  labels:
    {{- $own := dict "app.kubernetes.io/component" "trainer" "persona-train/blood-types" (join "-" .bloodTypes) }}
    {{- merge (dict) $own $selector ($values.podLabels | default dict) | toYaml | nindent 4 }}
  {{- with $values.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- include "persona-train.identity" $root | nindent 2 }}
  terminationGracePeriodSeconds: {{ int64 $values.terminationGracePeriodSeconds }}
  {{- with $values.priorityClassName }}
  priorityClassName: {{ . | quote }}
  {{- end }}
  {{- with $values.runtimeClassName }}
  runtimeClassName: {{ . | quote }}
  {{- end }}
  {{- with $values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  tolerations:
    {{- range list "not-ready" "unreachable" }}
    - key: node.kubernetes.io/{{ . }}
      operator: Exists
      effect: NoExecute
      tolerationSeconds: {{ int64 $values.unreachableTolerationSeconds }}
    {{- end }}
    {{- with $values.tolerations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with $values.initContainers }}
  initContainers:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: trainer
      image: {{ include "persona-train.image" $root | quote }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      args:
        - run
        {{- include "persona-train.options" . | nindent 8 }}
        - --work-dir=/job
        - --device={{ $values.device }}
        - --set=base.cache_dir=/cache/models/mirrors
      env:
        {{- include "persona-train.env" $root | nindent 8 }}
      {{- with $values.extraEnvFrom }}
      envFrom:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      resources:
        {{- $resources := deepCopy $values.resources }}
        {{- if include "persona-train.asksForGpu" $root }}
        {{- /* server-side apply rejects a number here */}}
        {{- $one := dict $values.gpu.resource "1" }}
        {{- $resources = merge (dict) $resources (dict "requests" $one "limits" $one) }}
        {{- end }}
        {{- toYaml $resources | nindent 8 }}
      # the job writes /dev/termination-log; if it is killed, its last log lines are shown instead
      terminationMessagePolicy: FallbackToLogsOnError
      {{- with $values.securityContext }}
      securityContext:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      volumeMounts:
        {{- include "persona-train.settingsMounts" $root | nindent 8 }}
        - name: work
          mountPath: /job
        - name: cache
          mountPath: /cache
        - name: models
          mountPath: /cache/models
        - name: compiled
          mountPath: /cache/compiled
        - name: shm
          mountPath: /dev/shm
        {{- if $values.baseModel.existingClaim }}
        - name: base
          mountPath: /models
          readOnly: true
        {{- end }}
        {{- with $values.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    {{- include "persona-train.settingsVolumes" $root | nindent 4 }}
    {{- include "persona-train.volume" (dict "root" $root "name" "work" "value" $values.workVolume) | nindent 4 }}
    # caches of other libraries
    - name: cache
      emptyDir:
        sizeLimit: 1Gi
    {{- include "persona-train.volume" (dict "root" $root "name" "models" "value" $values.modelCache) | nindent 4 }}
    {{- include "persona-train.volume" (dict "root" $root "name" "compiled" "value" $values.compileCache) | nindent 4 }}
    - name: shm
      emptyDir:
        medium: Memory
        sizeLimit: {{ $values.sharedMemory.size | quote }}
    {{- if $values.baseModel.existingClaim }}
    - name: base
      persistentVolumeClaim:
        claimName: {{ $values.baseModel.existingClaim | quote }}
        readOnly: true
    {{- end }}
    {{- with $values.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}

{{/* See docs/troubleshooting.md, Exit codes. Permanent failures end the Job, interruptions do not count, the rest counts against backoffLimit. */}}
{{- define "persona-train.podFailurePolicy" -}}
{{- $version := .Capabilities.KubeVersion.Version -}}
{{- if semverCompare ">=1.26.0-0" $version -}}
podFailurePolicy:
  rules:
    - action: FailJob
      onExitCodes:
        containerName: trainer
        operator: In
        values: [2, 3, 4, 5, 7]
      {{- if semverCompare "<1.29.0-0" $version }}
      # the published schema of these versions asks for it by mistake; their API server takes an empty one for none
      onPodConditions: []
      {{- end }}
    # a pod that was deleted or suspended has no DisruptionTarget
    - action: Ignore
      onExitCodes:
        containerName: trainer
        operator: In
        values: [143]
      {{- if semverCompare "<1.29.0-0" $version }}
      onPodConditions: []
      {{- end }}
    - action: Ignore
      onPodConditions:
        - type: DisruptionTarget
          status: "True"
{{- end -}}
{{- end -}}

{{/* dict "root" $ "bloodTypes" (list "A") */}}
{{- define "persona-train.jobSpec" -}}
{{- $values := .root.Values -}}
backoffLimit: {{ int64 $values.backoffLimit }}
activeDeadlineSeconds: {{ int64 $values.activeDeadlineSeconds }}
{{- if not (kindIs "invalid" $values.ttlSecondsAfterFinished) }}
ttlSecondsAfterFinished: {{ int64 $values.ttlSecondsAfterFinished }}
{{- end }}
{{- with include "persona-train.podFailurePolicy" .root }}
{{ . }}
{{- end }}
template:
  {{- include "persona-train.podTemplate" . | nindent 2 }}
{{- end -}}

{{/* Release and personas: "a", "ab", or "a-b" for a pod that trains A and B. dict "root" $ "bloodTypes" (list "A") */}}
{{- define "persona-train.personaName" -}}
{{- printf "%s-%s" (include "persona-train.base" .root) (join "-" .bloodTypes | lower) -}}
{{- end -}}

{{/*
The Job's name ends in a hash of all immutable parts: the pod template, the failure policy and the Kueue queue. So a change creates another
Job. The name has at most 43 + 1 + 8 + 1 + 10 characters, the limit of the pods' label. The hash covers the policy's comments, too.
*/}}
{{- define "persona-train.jobName" -}}
{{- $fixed := dict "template" (include "persona-train.podTemplate" . | fromYaml) "policy" (include "persona-train.podFailurePolicy" .root) "queue" .root.Values.kueue.queueName -}}
{{- printf "%s-%s" (include "persona-train.personaName" .) ($fixed | toJson | sha256sum | trunc 10) -}}
{{- end -}}

{{/* Labels of a Job, or of a CronJob's Jobs. */}}
{{- define "persona-train.jobLabels" -}}
{{- $own := dict "persona-train/blood-types" (join "-" .bloodTypes) -}}
{{- with .root.Values.kueue.queueName }}{{ $_ := set $own "kueue.x-k8s.io/queue-name" . }}{{ end -}}
{{- merge (dict) $own (include "persona-train.labels" .root | fromYaml) (.root.Values.jobLabels | default dict) | toYaml -}}
{{- end -}}

{{/* Report everything that the schema cannot check, all at once. */}}
{{- define "persona-train.validate" -}}
{{- $problems := list -}}
{{- with .Values -}}
{{- if and .bloodType .bloodTypes -}}
{{- $problems = append $problems (printf "bloodType: got %s and also bloodTypes %v, expected only one of them" .bloodType .bloodTypes) -}}
{{- end -}}
{{- if and (hasKey . "enabled") (not (kindIs "invalid" .enabled)) (not .enabled) -}}
{{- $problems = append $problems "enabled: got false, which only the Chart.yaml of a parent chart reads: write `condition: persona-train.enabled` under its dependency, or leave the value out" -}}
{{- end -}}
{{- if regexMatch "(?i)\\.(json|csv|tsv|txt|xlsx?|parquet|zip|gz|zst)$" (regexReplaceAll "(?i)\\.(jsonl|ndjson)(\\.gz|\\.zst)?$" .data "") -}}
{{- $problems = append $problems (printf "data: got %s, expected a folder, which ends in /, or a file that ends in .jsonl or .ndjson; turn others into JSONL with `lora-trainer convert`" .data) -}}
{{- end -}}
{{- $namesStore := .s3.endpoint -}}
{{- range .extraEnv }}{{ if hasPrefix "AWS_ENDPOINT_URL" .name }}{{ $namesStore = true }}{{ end }}{{ end -}}
{{- if not (or $namesStore .extraEnvFrom) -}}
{{- range $name, $uri := dict "data" .data "output" .output "baseModel.s3Uri" .baseModel.s3Uri -}}
{{- $bucket := regexFind "^s3://[^/]+" $uri | trimPrefix "s3://" -}}
{{- if and $bucket (or (contains ".." $bucket) (not (regexMatch "^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$" $bucket))) -}}
{{- $problems = append $problems (printf "%s: got the bucket %s, expected 3 to 63 lower-case letters, digits, dots and hyphens, as S3 demands; for a store that allows other names, set s3.endpoint" $name $bucket) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and (gt (len (.bloodTypes | default list)) 1) (regexMatch "(?i)\\.(jsonl|ndjson)(\\.gz|\\.zst)?$" .data) -}}
{{- $problems = append $problems (printf "data: got the single file %s for %s, expected a folder with a file for each" .data (join ", " .bloodTypes)) -}}
{{- end -}}
{{- $gpu := .gpu.resource -}}
{{- range $kind, $amounts := .resources -}}
{{- if hasKey $amounts $gpu -}}
{{- $problems = append $problems (printf "resources.%s: got %s, which the chart itself requests through gpu.resource; remove it" $kind $gpu) -}}
{{- end -}}
{{- end -}}
{{- $elsewhere := dict "blood_type" "bloodType" "data" "data" "output" "output" "device" "device" "work_dir" "workVolume" -}}
{{- range $setting, $value := .config -}}
{{- if hasKey $elsewhere $setting -}}
{{- $problems = append $problems (printf "config.%s: set the chart's own value instead: %s" $setting (get $elsewhere $setting)) -}}
{{- end -}}
{{- end -}}
{{- range $setting, $value := (.config | default dict).base -}}
{{- $problems = append $problems (printf "config.base.%s: set the chart's own values instead: baseModel, modelCache" $setting) -}}
{{- end -}}
{{- if and .baseModel.s3Uri .baseModel.existingClaim -}}
{{- $problems = append $problems "baseModel.s3Uri: set together with baseModel.existingClaim, expected only one of them" -}}
{{- end -}}
{{- if and .baseModel.path (not .baseModel.existingClaim) -}}
{{- $problems = append $problems "baseModel.path: expected baseModel.existingClaim as well, since it is a folder of that claim" -}}
{{- end -}}
{{- if and .caBundle.configMap .caBundle.secret -}}
{{- $problems = append $problems "caBundle.configMap: set together with caBundle.secret, expected only one of them" -}}
{{- end -}}
{{- if and .s3.kmsKeyId (ne .s3.serverSideEncryption "aws:kms") -}}
{{- $problems = append $problems "s3.kmsKeyId: expected s3.serverSideEncryption=aws:kms as well, the only one with a key" -}}
{{- end -}}
{{- $values := . -}}
{{- range list "workVolume" "modelCache" "compileCache" -}}
{{- $volume := get $values . -}}
{{- if and $volume.createClaim $volume.existingClaim -}}
{{- $problems = append $problems (printf "%s.existingClaim: set together with createClaim, expected only one of them" .) -}}
{{- end -}}
{{- end -}}
{{- $seconds := float64 .terminationGracePeriodSeconds -}}
{{- $grace := dig "checkpoints" "grace_s" 0.0 (.config | default dict) | float64 -}}
{{- if ge $grace $seconds -}}
{{- $problems = append $problems (printf "config.checkpoints.grace_s: got %v, expected less than terminationGracePeriodSeconds, %v" $grace $seconds) -}}
{{- end -}}
{{- if and .cronJob.timeZone (not .cronJob.schedule) -}}
{{- $problems = append $problems "cronJob.timeZone: has no effect without cronJob.schedule" -}}
{{- end -}}
{{- $own := list "config" "ca" "tmp" "work" "cache" "models" "compiled" "shm" "base" -}}
{{- range .extraVolumes -}}
{{- if has .name $own -}}
{{- $problems = append $problems (printf "extraVolumes %s: the chart already has a volume with this name; rename yours" .name) -}}
{{- end -}}
{{- end -}}
{{- $secrets := dict "AWS_SECRET_ACCESS_KEY" "s3.existingSecret" "AWS_SESSION_TOKEN" "s3.existingSecret" "HF_TOKEN" "hfToken.existingSecret" "OPENAI_API_KEY" "valueFrom" "WANDB_API_KEY" "valueFrom" -}}
{{- range .extraEnv -}}
{{- if and (hasKey . "value") (hasKey $secrets .name) -}}
{{- $problems = append $problems (printf "extraEnv %s: a plain-text secret would be stored in the release; use a Secret: %s" .name (get $secrets .name)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if $problems -}}
{{- fail (printf "\n%s" (join "\n" $problems)) -}}
{{- end -}}
{{- end -}}
