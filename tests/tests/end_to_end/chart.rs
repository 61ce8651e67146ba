//! `shim/deploy/chart`: renders what kustomize makes of the plain manifests, and refuses values that cannot be right.

use crate::manifests::{KUBERNETES, deploy, ensure_known, example, kustomize, objects, of_kind};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use tests::bed::SOON;
use tests::page::Page;
use tests::prelude::*;

/// Labels and annotations that only helm's objects have: whose they are, and a sum with which pods follow their
/// settings. The first is in selectors too, so that releases in one namespace keep their pods apart.
const OF_HELM: [&str; 4] =
    ["app.kubernetes.io/instance", "app.kubernetes.io/managed-by", "helm.sh/chart", "checksum/settings"];

const NAMESPACE: &str = "mail";

/// The release whose objects are called as in the plain manifests.
const RELEASE: &str = "mailroom";

/// One thing said in two ways.
struct Pair {
    what: &'static str,
    /// Values of the chart.
    values: &'static str,
    /// Folders of `shim/deploy`, and the rest of a kustomization that has each of them.
    parts: &'static [(&'static str, &'static str)],
}

/// What the comments of `values.yaml` say can be chosen, one by one and together.
const PAIRS: [Pair; 14] = [
    Pair { what: "defaults", values: "{}", parts: &[("base", "")] },
    Pair {
        what: "a login",
        values: "credentials: { secret: mailroom-nats }",
        parts: &[("base", "components: [../components/credentials]")],
    },
    Pair {
        what: "a disruption budget",
        values: "disruption: { enabled: true }",
        parts: &[("base", "components: [../components/disruption]")],
    },
    Pair {
        what: "KEDA's own trigger",
        values: "keda: { enabled: true }",
        parts: &[("base", "components: [../components/keda]")],
    },
    Pair {
        what: "our own scaler, for another consumer and with a login",
        values: "
keda: { enabled: true, trigger: external-push }
settings: { MAILROOM_STREAM: ORDERS, MAILROOM_CONSUMER: triage-eu, MAILROOM_MAX_IN_FLIGHT: '100' }
shards: 2
env: [{ name: MAILROOM_USER, value: mail }]
",
        parts: &[
            (
                "base",
                "
components: [../components/keda-push]
patches:
  - target: { kind: Job }
    patch: |-
      - { op: add, path: /spec/template/spec/containers/0/env, value: [{ name: MAILROOM_USER, value: mail }] }
  - target: { kind: Deployment }
    patch: |-
      - { op: replace, path: /spec/template/spec/containers/0/env/1/value, value: '2' }
      - { op: add, path: /spec/template/spec/containers/0/env/-, value: { name: MAILROOM_USER, value: mail } }
  - target: { kind: ConfigMap }
    patch: |-
      - { op: add, path: /data/MAILROOM_STREAM, value: ORDERS }
      - { op: add, path: /data/MAILROOM_CONSUMER, value: triage-eu }
      - { op: add, path: /data/MAILROOM_MAX_IN_FLIGHT, value: '100' }
  - target: { kind: ScaledObject }
    patch: |-
      - { op: replace, path: /spec/triggers/0/metadata/stream, value: ORDERS }
      - { op: replace, path: /spec/triggers/0/metadata/consumer, value: triage-eu }
      - { op: replace, path: /spec/triggers/0/metadata/maxInFlight, value: '200' }
",
            ),
            (
                "scaler",
                "
patches:
  - target: { kind: Deployment }
    patch: |-
      - { op: add, path: /spec/template/spec/containers/0/env/-, value: { name: MAILROOM_USER, value: mail } }
",
            ),
        ],
    },
    Pair {
        what: "the Prometheus operator",
        values: "monitoring: { enabled: true }",
        parts: &[("base", "components: [../components/monitoring]")],
    },
    Pair {
        what: "nodes that are prepared",
        values: "node: { enabled: true }",
        parts: &[("base", "components: [../components/node]"), ("node", "")],
    },
    Pair {
        what: "everything",
        values: EVERYTHING,
        parts: &[("base", EVERYTHING_PLAIN), ("scaler", "components: [../components/credentials]"), ("node", "")],
    },
    Pair {
        what: "images by tag and by digest",
        values: "
image:
  repository: localhost:5000/team/triage
  tag: loses
  digest: sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855
provision: { image: { repository: registry.example.com/team/triage-host, tag: '1.0' } }
node: { enabled: true, image: { repository: registry.example.com/team/mailroom-node, tag: '1_2' } }
",
        parts: &[
            (
                "base",
                "
components: [../components/node]
images:
  - name: triage
    newName: localhost:5000/team/triage
    digest: sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855
  - { name: triage-host, newName: registry.example.com/team/triage-host, newTag: '1.0' }
",
            ),
            (
                "node",
                "images: [{ name: mailroom-node, newName: registry.example.com/team/mailroom-node, newTag: '1_2' }]",
            ),
        ],
    },
    Pair {
        what: "nodes without the shim",
        values: "{ image: { repository: triage-host }, runtimeClass: { name: '' } }",
        parts: &[(
            "base",
            "
images: [{ name: triage, newName: triage-host }]
patches:
  - patch: '{ apiVersion: node.k8s.io/v1, kind: RuntimeClass, metadata: { name: mailroom }, $patch: delete }'
  - target: { kind: Deployment }
    patch: |-
      - { op: remove, path: /spec/template/spec/runtimeClassName }
",
        )],
    },
    Pair {
        what: "a class that is there",
        values: "runtimeClass: { name: wasm, create: false }",
        parts: &[(
            "base",
            "
patches:
  - patch: '{ apiVersion: node.k8s.io/v1, kind: RuntimeClass, metadata: { name: mailroom }, $patch: delete }'
  - target: { kind: Deployment }
    patch: |-
      - { op: replace, path: /spec/template/spec/runtimeClassName, value: wasm }
",
        )],
    },
    Pair {
        what: "some of the nodes",
        values: "{ runtimeClass: { nodeSelector: { pool: mail } }, node: { enabled: true } }",
        parts: &[
            (
                "base",
                "
patches:
  - target: { kind: RuntimeClass }
    patch: |-
      - { op: replace, path: /scheduling/nodeSelector, value: { pool: mail } }
",
            ),
            (
                "node",
                "
patches:
  - target: { kind: DaemonSet }
    patch: |-
      - { op: replace, path: /spec/template/spec/nodeSelector, value: { pool: mail } }
",
            ),
        ],
    },
    Pair {
        what: "an encrypted connection, with a certificate",
        values: "
server: tls://nats.example.com:4443
tls: { secret: nats-tls, client: true }
networkPolicy: { serverPorts: [4443] }
",
        parts: &[(
            "base",
            "
patches:
  - target: { kind: Deployment|Job }
    patch: |-
      - op: add
        path: /spec/template/spec/volumes
        value: [{ name: nats-tls, secret: { secretName: nats-tls } }]
      - op: add
        path: /spec/template/spec/containers/0/volumeMounts
        value: [{ name: nats-tls, mountPath: /etc/nats-tls, readOnly: true }]
  - target: { kind: NetworkPolicy }
    patch: |-
      - { op: replace, path: /spec/egress/0/ports/0/port, value: 4443 }
  - patch: |-
      apiVersion: v1
      kind: ConfigMap
      metadata: { name: mailroom }
      data:
        MAILROOM_SERVER: tls://nats.example.com:4443
        MAILROOM_TLS_CA: /etc/nats-tls/ca.crt
        MAILROOM_TLS_CERT: /etc/nats-tls/tls.crt
        MAILROOM_TLS_KEY: /etc/nats-tls/tls.key
",
        )],
    },
    Pair {
        what: "all that is one's own",
        values: "
settings: { MAILROOM_STREAM: ORDERS, MAILROOM_CONSUMER: triage-eu, MAILROOM_CONFIG_FILE: /etc/mailroom/triage.toml }
imagePullSecrets: [{ name: registry }]
replicas: 1000000
shards: 4
resources: { requests: { cpu: '2' }, limits: null }
args: [--log-format, text]
env: [{ name: MAILROOM_TOKEN, valueFrom: { secretKeyRef: { name: nats, key: token } } }]
volumes: [{ name: triage, configMap: { name: triage } }]
volumeMounts: [{ name: triage, mountPath: /etc/mailroom }]
terminationGracePeriodSeconds: 90
tolerations: [{ key: mail, operator: Exists }]
node: { enabled: true, settings: { MAILROOM_NODE_CONFIG: /etc/other.toml } }
",
        parts: &[
            (
                "base",
                "
components: [../components/node]
patches:
  - patch: |-
      apiVersion: v1
      kind: ConfigMap
      metadata: { name: mailroom }
      data:
        MAILROOM_STREAM: ORDERS
        MAILROOM_CONSUMER: triage-eu
        MAILROOM_CONFIG_FILE: /etc/mailroom/triage.toml
  - target: { kind: Deployment|Job }
    patch: |-
      - { op: add, path: /spec/template/spec/imagePullSecrets, value: [{ name: registry }] }
  - patch: |-
      apiVersion: batch/v1
      kind: Job
      metadata: { name: mailroom-provision }
      spec:
        template:
          spec:
            containers:
              - name: provision
                env: [{ name: MAILROOM_TOKEN, valueFrom: { secretKeyRef: { name: nats, key: token } } }]
  - patch: |-
      apiVersion: apps/v1
      kind: Deployment
      metadata: { name: triage }
      spec:
        replicas: 1000000
        template:
          spec:
            terminationGracePeriodSeconds: 90
            tolerations: [{ key: mail, operator: Exists }]
            containers:
              - name: triage
                args: [--log-format, text]
                env:
                  - { name: MAILROOM_LISTEN, value: 0.0.0.0:9464 }
                  - { name: MAILROOM_SHARDS, value: '4' }
                  - { name: MAILROOM_TOKEN, valueFrom: { secretKeyRef: { name: nats, key: token } } }
                resources: { requests: { cpu: '2' }, limits: null }
                volumeMounts: [{ name: triage, mountPath: /etc/mailroom }]
            volumes: [{ name: triage, configMap: { name: triage } }]
",
            ),
            (
                "node",
                "
patches:
  - target: { kind: DaemonSet }
    patch: |-
      - { op: add, path: /spec/template/spec/imagePullSecrets, value: [{ name: registry }] }
  - target: { kind: ConfigMap }
    patch: |-
      - { op: replace, path: /data, value: { MAILROOM_NODE_CONFIG: /etc/other.toml } }
",
            ),
        ],
    },
];

/// All that is not there by itself.
const EVERYTHING: &str = "
credentials: { secret: mailroom-nats }
disruption: { enabled: true }
keda: { enabled: true, trigger: external-push }
monitoring: { enabled: true }
node: { enabled: true }
";

const EVERYTHING_PLAIN: &str = "
components:
  - ../components/credentials
  - ../components/disruption
  - ../components/keda-push
  - ../components/monitoring
  - ../components/node
";

/// Another than the one that is there, for each value.
const OTHERS: [(&str, &str); 46] = [
    ("server", "nats://elsewhere:4222"),
    ("settings", "{ MAILROOM_STREAM: ORDERS }"),
    ("image.repository", "elsewhere/triage"),
    ("image.tag", "'2'"),
    ("image.digest", "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
    ("provision.image.repository", "elsewhere/triage-host"),
    ("provision.image.tag", "'2'"),
    ("provision.image.digest", "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
    ("imagePullSecrets", "[{ name: registry }]"),
    ("replicas", "3"),
    ("shards", "3"),
    ("resources.requests.cpu", "3"),
    ("resources.requests.memory", "3Mi"),
    ("resources.limits.memory", "3Mi"),
    ("args", "[--watch]"),
    ("env", "[{ name: RUST_BACKTRACE, value: '0' }]"),
    ("volumes", "[{ name: scratch, emptyDir: {} }]"),
    ("volumeMounts", "[{ name: scratch, mountPath: /scratch }]"),
    ("terminationGracePeriodSeconds", "60"),
    ("tolerations", "[{ operator: Exists }]"),
    ("credentials.secret", "other"),
    ("tls.secret", "other"),
    ("tls.client", "true"),
    ("networkPolicy.serverPorts", "[4222, 4223]"),
    ("runtimeClass.name", "other"),
    ("runtimeClass.create", "false"),
    ("runtimeClass.nodeSelector", "{ pool: mail }"),
    ("node.enabled", "false"),
    ("node.image.repository", "elsewhere/node"),
    ("node.image.tag", "'2'"),
    ("node.image.digest", "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
    ("node.settings", "{ MAILROOM_NODE_BIN: /opt/bin }"),
    ("disruption.enabled", "false"),
    ("keda.enabled", "false"),
    ("keda.trigger", "nats-jetstream"),
    ("keda.minReplicas", "1"),
    ("keda.maxReplicas", "3"),
    ("keda.pollingInterval", "3"),
    ("keda.cooldownPeriod", "3"),
    ("keda.lagThreshold", "3"),
    ("keda.activationLagThreshold", "3"),
    ("keda.natsJetstream.monitoringEndpoint", "elsewhere:8222"),
    ("keda.natsJetstream.account", "MAIL"),
    ("keda.externalPush.targetDrainSeconds", "3"),
    ("monitoring.enabled", "false"),
    ("monitoring.labels", "{ release: prometheus }"),
];

/// What is refused, and what is said of it.
const REFUSED: [(&str, &[&str]); 24] = [
    ("sever: nats://nats:4222", &["additional properties 'sever' not allowed"]),
    ("server: ''", &["/server", "minLength"]),
    ("keda: null", &["missing property 'keda'"]),
    ("image: { repository: null }", &["/image", "missing property 'repository'"]),
    ("settings: { MAILROOM_SLOTS: 64 }", &["/settings/MAILROOM_SLOTS", "want string"]),
    ("settings: { SLOTS: '64' }", &["/settings", "additional properties 'SLOTS' not allowed"]),
    ("settings: { MAILROOM_SERVER: nats://nats }", &["settings.MAILROOM_SERVER", "the value server"]),
    ("settings: { MAILROOM_LISTEN: none }", &["settings.MAILROOM_LISTEN", "the probes"]),
    ("settings: { MAILROOM_SHARDS: '2' }", &["settings.MAILROOM_SHARDS", "the value shards"]),
    ("image: { repository: 'team/triage:1.0' }", &["/image/repository", "team/triage:1.0"]),
    ("image: { tag: 1.0 }", &["/image/tag", "want string"]),
    ("image: { digest: 'sha256:12' }", &["/image/digest", "sha256:12"]),
    ("provision: { repository: triage-host }", &["/provision", "'repository'"]),
    ("imagePullSecrets: [registry]", &["/imagePullSecrets/0", "want object"]),
    ("replicas: -1", &["/replicas", "got -1, want 0"]),
    ("shards: 0", &["/shards", "got 0, want 1"]),
    ("env: { RUST_BACKTRACE: '0' }", &["/env", "want array"]),
    ("networkPolicy: { serverPorts: [] }", &["/networkPolicy/serverPorts", "minItems"]),
    ("node: { enabled: 'yes' }", &["/node/enabled", "want boolean"]),
    ("node: { settings: { MAILROOM_SERVER: a } }", &["/node/settings", "'MAILROOM_SERVER'"]),
    ("keda: { trigger: cron }", &["/keda/trigger", "'nats-jetstream'"]),
    (
        "keda: { natsJetstream: { monitoringEndpoint: 'http://nats:8222' } }",
        &["/keda/natsJetstream/monitoringEndpoint"],
    ),
    (
        "keda: { enabled: true, minReplicas: 5, maxReplicas: 3 }",
        &["keda.minReplicas 5 is more than keda.maxReplicas 3"],
    ),
    ("tls: { client: true }", &["tls.client is for tls.secret"]),
];

/// Runs helm, which finds nobody's settings and no cluster.
async fn helm(args: &[&str], values: &str) -> Result<Output> {
    let home = tempfile::tempdir()?;
    let (home, helm) = (format!("HOME={}", home.path().display()), tools::helm()?);
    let helm = helm.to_str().context("a path in UTF-8")?;
    // The folders that it would prefer to those below HOME.
    let unset = ["HELM_CONFIG_HOME", "HELM_CACHE_HOME", "HELM_DATA_HOME", "HELM_PLUGINS", "KUBECONFIG"];
    let unset = unset.iter().flat_map(|variable| ["-u", variable]);
    let args = unset.chain([home.as_str(), helm]).chain(args.iter().copied());
    command::run("/usr/bin/env", args, values.as_bytes(), SOON).await
}

/// What the chart renders to as a release of this name.
async fn template(release: &str, values: &str, options: &[&str]) -> Result<Output> {
    let chart = deploy().join("chart");
    let chart = chart.to_str().context("a path in UTF-8")?;
    let args = ["template", release, chart, "--namespace", NAMESPACE, "--values", "-"];
    helm(&[&args, options].concat(), values).await
}

async fn rendered(values: &str) -> Result<String> {
    Ok(template(RELEASE, values, &[]).await?.success()?.stdout)
}

/// What kustomize makes of the plain manifests.
async fn plain(pair: &Pair) -> Result<String> {
    let mut all = String::new();
    for (part, rest) in pair.parts {
        // The nodes' part has a namespace of its own.
        let namespace = if *part == "node" { String::new() } else { format!("namespace: {NAMESPACE}\n") };
        // Kustomize takes no absolute paths.
        let folder = tempfile::tempdir_in(deploy())?;
        fs::write(folder.path().join("kustomization.yaml"), format!("{namespace}resources: [../{part}]\n{rest}"))?;
        all += &format!("---\n{}", kustomize(folder.path()).await?);
    }
    Ok(all)
}

/// The objects by what tells them apart, without what only helm's have.
async fn by_name(yaml: &str) -> Result<BTreeMap<String, Value>> {
    let mut named = BTreeMap::new();
    for mut object in objects(yaml).await? {
        strip(&mut object);
        let name = name(&object);
        ensure!(named.insert(name.clone(), object).is_none(), "two of {name}");
    }
    Ok(named)
}

/// Kind, namespace and name of an object.
fn name(object: &Value) -> String {
    let part = |pointer| object.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
    format!("{} {}/{}", part("/kind"), part("/metadata/namespace"), part("/metadata/name"))
}

/// Takes what only helm's objects have out of the labels, annotations and selectors of an object, and those that are
/// empty then.
fn strip(value: &mut Value) {
    let Some(fields) = value.as_object_mut() else {
        value.as_array_mut().into_iter().flatten().for_each(strip);
        return;
    };
    for (field, value) in fields.iter_mut() {
        if let (true, Some(labels)) = (OF_LABELS.contains(&field.as_str()), value.as_object_mut()) {
            labels.retain(|label, _| !OF_HELM.contains(&label.as_str()));
        }
        strip(value);
    }
    fields.retain(|field, value| !OF_LABELS.contains(&field.as_str()) || *value != json!({}));
}

/// The fields that have labels or annotations in them.
const OF_LABELS: [&str; 4] = ["labels", "annotations", "matchLabels", "selector"];

/// Fails when these are not the same objects; says where they differ.
async fn ensure_same(what: &str, helms: &str, plain: &str) -> Result<()> {
    let (helms, plain) = (by_name(helms).await?, by_name(plain).await?);
    let names = |objects: &BTreeMap<String, Value>| objects.keys().cloned().collect::<BTreeSet<_>>();
    ensure!(names(&helms) == names(&plain), "{what}: {:#?}, but plain {:#?}", names(&helms), names(&plain));
    for (name, object) in &helms {
        let other = &plain[name];
        ensure!(object == other, "{what}, {name}: {}", differences("", object, other).join("\n"));
    }
    Ok(())
}

/// Where two values differ.
fn differences(pointer: &str, helms: &Value, plain: &Value) -> Vec<String> {
    match (helms, plain) {
        (Value::Object(helms), Value::Object(plain)) => {
            let fields: BTreeSet<_> = helms.keys().chain(plain.keys()).collect();
            let field = |of: &Map<String, Value>, name: &String| of.get(name).cloned().unwrap_or_default();
            let of = |name| differences(&format!("{pointer}/{name}"), &field(helms, name), &field(plain, name));
            fields.into_iter().flat_map(of).collect()
        }
        _ if helms == plain => Vec::new(),
        _ => vec![format!("{pointer} is {helms}, but plain {plain}")],
    }
}

/// Who installs with helm has what they would have with kustomize, whatever they choose, and Kubernetes knows it.
#[tokio::test]
async fn helm_and_kustomize_render_the_same_objects() -> Result<()> {
    let mut all = String::new();
    for pair in &PAIRS {
        let helms = rendered(pair.values).await.context(pair.what)?;
        ensure_same(pair.what, &helms, &plain(pair).await.context(pair.what)?).await?;
        all += &helms;
    }
    ensure_known("the chart", &all).await
}

/// What the page says of helm makes what it says of kustomize.
#[tokio::test]
async fn the_page_installs_the_same_with_helm() -> Result<()> {
    let page = Page::read("docs/kubernetes.md")?;
    let values = page
        .blocks
        .iter()
        .find(|block| block.tag == "yaml" && block.file().is_ok_and(|file| file == "mail/values.yaml"));
    let values = &values.context("values for helm")?.text;
    let command =
        page.blocks.iter().flat_map(|block| block.text.lines()).find(|line| line.starts_with("helm install "));
    let command = command.context("helm install")?;
    let expected =
        "helm install mailroom shim/deploy/chart --namespace mail --create-namespace --values mail/values.yaml";
    ensure!(command == expected, "not what this test renders: {command}");
    let plain = [example("mail/kustomization.yaml").await?, example("node/kustomization.yaml").await?].join("---\n");
    ensure_same("the page", &rendered(values).await?, &plain).await
}

#[tokio::test]
async fn helm_finds_nothing_wrong_with_the_chart() -> Result<()> {
    let chart = deploy().join("chart");
    let chart = chart.to_str().context("a path in UTF-8")?;
    for values in ["{}", EVERYTHING] {
        helm(&["lint", "--strict", chart, "--values", "-"], values).await?.success()?;
    }
    let of_chart = &objects(&fs::read_to_string(deploy().join("chart/Chart.yaml"))?).await?[0];
    for field in ["version", "appVersion"] {
        ensure!(of_chart[field] == env!("CARGO_PKG_VERSION"), "{field} is not the workspace's: {}", of_chart[field]);
    }
    // From the oldest Kubernetes that the objects are checked against.
    let minor = KUBERNETES[0].strip_prefix("1.").context("a version")?.parse::<u32>()?;
    for (minor, taken) in [(minor, true), (minor - 1, false), (99, true)] {
        let version = format!("1.{minor}.0");
        let output = template(RELEASE, "{}", &["--kube-version", &version]).await?;
        ensure!(output.status.success() == taken, "Kubernetes {version}: {}", output.stderr);
    }
    Ok(())
}

/// A value that is misspelt or cannot be right is refused with its name, before anything is installed.
#[tokio::test]
async fn wrong_values_are_refused_by_name() -> Result<()> {
    for (values, said) in REFUSED {
        let output = template(RELEASE, values, &[]).await?;
        ensure!(!output.status.success(), "taken: {values}");
        for words in said {
            ensure!(output.stderr.contains(words), "{values}: not said: {words}\n{}", output.stderr);
        }
    }
    Ok(())
}

/// There is no value that does nothing, that is not explained, or that the schema does not know.
#[tokio::test]
async fn every_value_is_used_and_explained() -> Result<()> {
    let chart = deploy().join("chart");
    let text = fs::read_to_string(chart.join("values.yaml"))?;
    let values = &objects(&text).await?[0];
    let mut given = BTreeSet::new();
    leaves("", values, &mut given);
    let known: BTreeSet<_> = OTHERS.iter().map(|(name, _)| (*name).to_owned()).collect();
    ensure!(given == known, "values.yaml has {given:#?}, this test {known:#?}");

    let lines: Vec<_> = text.lines().map(str::trim).collect();
    for (before, line) in lines.iter().zip(&lines[1..]) {
        let explained = line.is_empty() || line.starts_with('#') || before.starts_with('#');
        ensure!(explained, "values.yaml does not explain {line}");
    }

    let schema: Value = serde_json::from_str(&fs::read_to_string(chart.join("values.schema.json"))?)?;
    ensure_described("", values, &schema, &schema)?;

    // With what makes each of them matter.
    let all = objects(EVERYTHING).await?.remove(0);
    for (name, other) in OTHERS {
        let other = objects(other).await?.remove(0);
        let mut reference = all.clone();
        let needs: &[(&str, Value)] = match name {
            "replicas" => &[("keda.enabled", json!(false))],
            "keda.natsJetstream.monitoringEndpoint" | "keda.natsJetstream.account" => {
                &[("keda.trigger", json!("nats-jetstream"))]
            }
            "tls.client" => &[("tls.secret", json!("nats-tls"))],
            _ => &[],
        };
        needs.iter().for_each(|(name, value)| set(&mut reference, name, value.clone()));
        let mut changed = reference.clone();
        set(&mut changed, name, other);
        let (before, after) = (rendered(&reference.to_string()).await?, rendered(&changed.to_string()).await?);
        ensure!(before != after, "{name} changes nothing");
    }
    Ok(())
}

/// The names of the values that have no others in them, with dots.
fn leaves(name: &str, value: &Value, found: &mut BTreeSet<String>) {
    match value.as_object().filter(|fields| !fields.is_empty()) {
        None => _ = found.insert(name.to_owned()),
        Some(fields) => {
            for (field, value) in fields {
                let name = if name.is_empty() { field.clone() } else { format!("{name}.{field}") };
                leaves(&name, value, found);
            }
        }
    }
}

/// Gives a value with dots in its name.
fn set(values: &mut Value, name: &str, value: Value) {
    let place = name.split('.').fold(values, |place, field| &mut place[field]);
    *place = value;
}

/// Fails when the schema takes more or less than these values and those below them.
fn ensure_described(name: &str, value: &Value, schema: &Value, root: &Value) -> Result<()> {
    let schema = match schema["$ref"].as_str() {
        Some(place) => root.pointer(place.trim_start_matches('#')).with_context(|| format!("no {place}"))?,
        None => schema,
    };
    let Some(described) = schema["properties"].as_object() else { return Ok(()) };
    ensure!(schema["additionalProperties"] == false, "{name} takes anything");
    let fields = value.as_object().with_context(|| format!("{name} has no values in it"))?;
    // `global` is helm's own, for charts that are part of others.
    let described_here: BTreeSet<_> = described.keys().filter(|field| *field != "global").collect();
    ensure!(fields.keys().collect::<BTreeSet<_>>() == described_here, "{name}: the schema has {described_here:?}");
    // One that is taken away with `null` is missed, but for limits, which a pod can do without.
    let required = schema["required"].as_array().map_or(0, Vec::len);
    ensure!(required == described_here.len() || name == ".resources", "{name}: not all is required");
    fields
        .iter()
        .try_for_each(|(field, value)| ensure_described(&format!("{name}.{field}"), value, &described[field], root))
}

/// Two teams may share a namespace: nothing of theirs has one name, and no selector finds the other's pods.
#[tokio::test]
async fn releases_stand_beside_each_other() -> Result<()> {
    let others = format!("{EVERYTHING}\nruntimeClass: {{ create: false }}");
    let first = objects(&rendered(EVERYTHING).await?).await?;
    let second = objects(&template("bugs", &others, &[]).await?.success()?.stdout).await?;
    for object in &second {
        ensure!(!first.iter().any(|other| name(other) == name(object)), "both have {}", name(object));
    }
    let pods = |objects: &[Value]| -> Vec<Value> {
        objects.iter().filter_map(|object| object.pointer("/spec/template/metadata/labels")).cloned().collect()
    };
    let mut selectors = 0;
    for (ours, theirs) in [(&first, &second), (&second, &first)] {
        for object in ours.iter() {
            let places = ["/spec/selector/matchLabels", "/spec/podSelector/matchLabels", "/spec/selector"];
            let selector = places.iter().find_map(|place| object.pointer(place));
            let Some(selector) = selector.and_then(Value::as_object) else { continue };
            selectors += 1;
            let finds = |pods: &[Value]| {
                pods.iter().any(|labels| selector.iter().all(|(label, value)| labels[label] == *value))
            };
            ensure!(finds(&pods(ours)), "{} finds no pods", name(object));
            ensure!(!finds(&pods(theirs)), "{} finds the other's pods", name(object));
        }
    }
    // Those of the Deployments, the DaemonSet, Services, policies, the budget and the monitor.
    ensure!(selectors == 2 * 9, "{selectors} selectors");
    Ok(())
}

/// Upgrades work: pods follow their settings and nothing else, and the Job, which cannot change, is another one.
#[tokio::test]
async fn an_upgrade_restarts_what_has_changed() -> Result<()> {
    let pods = async |values: &str| {
        let objects = objects(&rendered(values).await?).await?;
        let of = |kind| anyhow::Ok(of_kind(&objects, kind)?["spec"]["template"].clone());
        anyhow::Ok((of("Deployment")?, of("DaemonSet")?))
    };
    let before = pods("node: { enabled: true }").await?;
    let scaled = pods("{ node: { enabled: true }, replicas: 5, monitoring: { enabled: true } }").await?;
    ensure!(before == scaled, "pods are made anew for nothing");
    let settings = pods("{ node: { enabled: true }, settings: { MAILROOM_LOG: debug } }").await?;
    ensure!(before.0 != settings.0 && before.1 == settings.1, "not the hosts, or not they alone");
    let of_node = pods("node: { enabled: true, settings: { MAILROOM_NODE_BIN: /opt/bin } }").await?;
    ensure!(before.0 == of_node.0 && before.1 != of_node.1, "not the installers, or not they alone");

    let upgrade = template(RELEASE, "{}", &["--is-upgrade"]).await?.success()?.stdout;
    let job = of_kind(&objects(&upgrade).await?, "Job")?["metadata"]["name"].clone();
    ensure!(job == "mailroom-provision-1", "{job}");
    let long = "r".repeat(53);
    let upgrade = template(&long, "{}", &["--is-upgrade"]).await?.success()?.stdout;
    let job = of_kind(&objects(&upgrade).await?, "Job")?["metadata"]["name"].clone();
    let job = job.as_str().context("a name")?;
    ensure!(job.len() < 63 && job.ends_with("-1"), "no label can be {job}");
    Ok(())
}

/// What is printed after an installation names objects that are there.
#[tokio::test]
async fn the_next_commands_fit_the_release() -> Result<()> {
    let chart = deploy().join("chart");
    let chart = chart.to_str().context("a path in UTF-8")?;
    for (release, values, job) in [(RELEASE, "{}", "mailroom-provision"), ("bugs", EVERYTHING, "bugs-provision")] {
        let args = ["install", release, chart, "--namespace", NAMESPACE, "--dry-run=client", "--values", "-"];
        let printed = helm(&args, values).await?.success()?.stdout;
        let (_, notes) = printed.split_once("\nNOTES:\n").context("no notes")?;
        let objects = objects(&template(release, values, &[]).await?.success()?.stdout).await?;
        let known: BTreeSet<String> = objects
            .iter()
            .map(|object| {
                let part = |pointer| object.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
                format!(
                    "--namespace {} {}/{}",
                    part("/metadata/namespace"),
                    part("/kind").to_lowercase(),
                    part("/metadata/name")
                )
            })
            .collect();
        let mut named = 0;
        for line in notes.lines().filter(|line| line.contains("kubectl --namespace ")) {
            let words: Vec<_> = line.split_whitespace().collect();
            let Some(object) = words.iter().find(|word| word.contains('/') && !word.contains('=')) else { continue };
            let object = format!("--namespace {} {object}", words[2]);
            ensure!(known.contains(&object), "{line}: there is only {known:#?}");
            named += 1;
        }
        ensure!(named >= 4 && notes.contains(&format!("job/{job} ")), "{notes}");
    }
    Ok(())
}
