//! `shim/deploy` under a real Kubernetes, which `cargo xtask test-kubernetes` builds.

use crate::site::make_image;
use serde_json::{Value, json};
use shim_tests::prelude::*;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;
use tests::autoscaler;
use tests::mix::{Publisher, mails};
use tests::page::Page;
use tests::simulation::{Phase, Replicas, Trigger, simulate};
use tests::streams::VERDICTS;

/// Where everything of ours is.
const NAMESPACE: &str = "mail";

/// What the Deployment and the label of its pods are called.
const TRIAGE: &str = "triage";
const LABEL: &str = "app.kubernetes.io/component=triage";

/// Time for a few pods, and for many, on a busy machine.
const PODS_SOON: Duration = Duration::from_secs(120);
const MANY_PODS: u64 = 30;

/// The mails that come in every second while pods come and go.
const LOAD_PER_SECOND: u32 = 150;

/// What this version of Kubernetes lacks: a stand-in for the operators, and a name for an older version of a kind.
const DEFINITIONS: [(&str, &str, &str, &str); 3] = [
    ("keda.sh", "v1alpha1", "ScaledObject", "scaledobjects"),
    ("monitoring.coreos.com", "v1", "PodMonitor", "podmonitors"),
    ("monitoring.coreos.com", "v1", "PrometheusRule", "prometheusrules"),
];

/// A Kubernetes with images and a nats-server that its pods reach.
struct Cluster {
    kubernetes: Kubernetes,
    bed: Bed,
}

impl Cluster {
    /// With the images of components, and that of the host, which provisions.
    async fn new(components: &[&str]) -> Result<Self> {
        let kubernetes = Kubernetes::start(Shim::Placed).await?;
        let node = &kubernetes.node;
        for component in components {
            make_image(node, component, component, &[]).await?;
        }
        let executable = tools::shim()?.join("mailroom-host");
        let host = ["--format", "host", "--executable", &executable.to_string_lossy()];
        make_image(node, "triage", "triage-host", &host).await?;
        let server = node.nats(Settings::default()).await?;
        let jetstream = server.jetstream().await?;
        let cluster = Self { kubernetes, bed: Bed { server, jetstream, patience: SOON } };
        cluster.kubernetes.kubectl(&["create", "namespace", NAMESPACE]).await?.success()?;
        let label = ["label", "node", cluster.kubernetes.node_name(), "mailroom=enabled"];
        cluster.kubernetes.kubectl(&label).await?.success()?;
        Ok(cluster)
    }

    /// Applies `shim/deploy` with the image of a component: the base, these components, and more patches to it.
    async fn deploy(&self, name: &str, components: &[&str], patches: &[Value]) -> Result<()> {
        let folder = self.kubernetes.node.folder().join("deploy");
        copy(&tools::workspace().join("shim/deploy"), &folder)?;
        let settings = json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": { "name": "mailroom" },
            "data": { "MAILROOM_SERVER": self.bed.server.url() },
        });
        let mut all = vec![json!({ "patch": settings.to_string() })];
        if components.contains(&"disruption") {
            // Kubernetes 1.20 knows it by an older name.
            let older = json!([{ "op": "replace", "path": "/apiVersion", "value": "policy/v1beta1" }]);
            all.push(json!({ "target": { "kind": "PodDisruptionBudget" }, "patch": older.to_string() }));
        }
        all.extend_from_slice(patches);
        let components: Vec<_> = components.iter().map(|name| format!("../components/{name}")).collect();
        let image = |name: &str, image: &str| json!({ "name": name, "newName": format!("mailroom.local/{image}"), "newTag": "1" });
        let overlay = json!({
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "namespace": NAMESPACE,
            "resources": ["../base"],
            "components": components,
            "images": [image("triage", name), image("triage-host", "triage-host")],
            "patches": all,
        });
        let place = folder.join("here");
        fs::create_dir_all(&place)?;
        fs::write(place.join("kustomization.yaml"), overlay.to_string())?;
        self.kubernetes.kubectl(&["apply", "--kustomize", &place.to_string_lossy()]).await?.success()?;
        Ok(())
    }

    /// Runs `kubectl` in the namespace.
    async fn kubectl(&self, args: &[&str]) -> Result<Output> {
        self.kubernetes.kubectl(&[&["--namespace", NAMESPACE], args].concat()).await
    }

    async fn until_ready(&self, pods: u64) -> Result<()> {
        self.kubernetes.until_ready(NAMESPACE, TRIAGE, pods, PODS_SOON).await?;
        self.until_pods(pods).await
    }

    /// Waits until there are so many pods, those that are about to go included.
    async fn until_pods(&self, pods: u64) -> Result<()> {
        let look = async || Ok(self.kubernetes.pods(NAMESPACE, LABEL).await?.len() as u64);
        eventually(PODS_SOON, &format!("{pods} pods"), look, |seen| *seen == pods).await.map(drop)
    }

    /// Has the Deployment have so many pods, and says how long it took until they were ready, or gone.
    async fn scale(&self, pods: u64) -> Result<Duration> {
        let start = Instant::now();
        self.kubectl(&["scale", "deployment", TRIAGE, &format!("--replicas={pods}")]).await?.success()?;
        self.until_ready(pods).await?;
        Ok(start.elapsed())
    }

    async fn finish(self) -> Result<()> {
        self.kubernetes.delete_namespace(NAMESPACE).await?;
        self.kubernetes.finish().await
    }
}

/// What the page shows runs: from a node without the shim to pods that scale, and back to a node as it was.
#[tokio::test]
async fn commands_of_the_kubernetes_page_run() -> Result<()> {
    let kubernetes = Kubernetes::start(Shim::Absent).await?;
    let node = &kubernetes.node;
    let server = node.nats(Settings::default()).await?;
    let deploy = node.folder().join("deploy");
    copy(&tools::workspace().join("shim/deploy"), &deploy)?;
    // What Kubernetes 1.20 has not yet, and what is elsewhere on this node.
    edit(&deploy.join("components/disruption/poddisruptionbudget.yaml"), "policy/v1", "policy/v1beta1")?;
    edit(
        &deploy.join("node/daemonset.yaml"),
        "      maxSurge: 1\n      maxUnavailable: 0\n",
        "      maxUnavailable: 1\n",
    )?;
    let settings = json!({
        "MAILROOM_NODE_BIN": node.bin(),
        "MAILROOM_NODE_CONFIG": node.configuration(),
        "MAILROOM_NODE_OPTIONS": node.options(),
        "MAILROOM_NODE_RESTART": node.restart(),
    });
    edit(&deploy.join("node/configmap.yaml"), "data: {}", &format!("data: {settings}"))?;
    node.import(&[installer(&deploy.join("node/Dockerfile"))?]).await?;
    let before = (fs::read_to_string(node.configuration())?, files(&node.bin())?);

    let mut page = Page::read("docs/kubernetes.md")?;
    page.replace("nats://nats.example.com:4222", server.url())?;
    page.links.push((deploy, "shim/deploy"));
    let (config, socket) = (kubernetes.kubeconfig(), node.socket());
    let environment = [
        ("MAILROOM_SERVER", server.url()),
        ("CONTAINERD_ADDRESS", &*socket.to_string_lossy()),
        ("KUBECONFIG", &*config.to_string_lossy()),
        ("HOME", &*node.folder().to_string_lossy()),
    ];
    page.run(&environment, Duration::from_secs(400)).await?;

    assert_eq!((fs::read_to_string(node.configuration())?, files(&node.bin())?), before);
    kubernetes.finish().await
}

/// The image of the Dockerfile, under the name that the page gives it.
fn installer(dockerfile: &Path) -> Result<Image> {
    let text = fs::read_to_string(dockerfile)?;
    let of = |word: &str| text.lines().find_map(|line| line.strip_prefix(word)).context(word.to_owned());
    let files = of("COPY ")?.strip_suffix(" /").context("files to /")?;
    let entrypoint: Vec<String> = serde_json::from_str(of("ENTRYPOINT ")?)?;
    let entrypoint: Vec<&str> = entrypoint.iter().map(String::as_str).collect();
    let mut image = Image::scratch("node", &entrypoint).named("registry.example.com/team/mailroom-node:1.0");
    for file in files.split(' ') {
        image = image.file(file, fs::read(tools::shim()?.join(file))?);
    }
    Ok(image)
}

/// Replaces a part of a file that must be there.
fn edit(file: &Path, old: &str, new: &str) -> Result<()> {
    let text = fs::read_to_string(file)?;
    ensure!(text.contains(old), "{}: no {old:?}", file.display());
    Ok(fs::write(file, text.replace(old, new))?)
}

/// The names in a folder.
fn files(folder: &Path) -> Result<Vec<std::ffi::OsString>> {
    Ok(folder.read_dir()?.flatten().map(|entry| entry.file_name()).collect())
}

/// From `kubectl apply` to a verdict, with all components; what one sees of it, and what one may not.
#[tokio::test]
async fn a_deployment_gives_verdicts() -> Result<()> {
    let cluster = Cluster::new(&["triage"]).await?;
    for (group, version, kind, plural) in DEFINITIONS {
        cluster.kubernetes.apply(&definition(group, version, kind, plural)).await?;
        let name = format!("crd/{plural}.{group}");
        let wait = ["wait", "--for=condition=established", "--timeout=60s", &name];
        cluster.kubernetes.kubectl(&wait).await?.success()?;
    }
    let start = Instant::now();
    cluster.deploy("triage", &["disruption", "keda", "monitoring"], &[]).await?;
    let mail = fs::read(tools::mails()?.into_iter().find(|mail| mail.ends_with("01-outage.eml")).context("a mail")?)?;
    let publish = async || {
        let published = cluster.bed.jetstream.publish("mail.test", mail.clone().into()).await?;
        Ok(published.await?)
    };
    eventually(PODS_SOON, "the job has made the stream", publish, |_| true).await?;
    let verdicts = async || streams::count(&cluster.bed.jetstream, VERDICTS).await;
    eventually(PODS_SOON, "the first verdict", verdicts, |count| *count == 1).await?;
    let first = start.elapsed();
    cluster.until_ready(1).await?;
    report("from kubectl apply to the first verdict, of which one mail waited for the stream", first);
    let verdict = streams::verdicts(&cluster.bed.jetstream).await?[0].json()?;
    assert_eq!((verdict["queue"].as_str(), verdict["priority"].as_str()), (Some("operations"), Some("urgent")));

    let status = cluster.kubectl(&["rollout", "status", "deployment/triage", "--timeout=60s"]).await?.success()?;
    assert!(status.stdout.contains("successfully rolled out"), "{status:?}");
    cluster
        .kubectl(&["wait", "--for=condition=complete", "job/mailroom-provision", "--timeout=60s"])
        .await?
        .success()?;
    let log = cluster.kubectl(&["logs", "deployment/triage"]).await?.success()?.stdout;
    assert!(log.lines().any(|line| line.contains("\"running\"")), "{log}");
    let exec = cluster.kubectl(&["exec", "deployment/triage", "--", "/bin/sh"]).await?;
    assert!(!exec.status.success() && exec.stderr.contains("exec is not for a WebAssembly container"), "{exec:?}");
    for kind in ["ScaledObject", "PodMonitor", "PrometheusRule", "PodDisruptionBudget", "NetworkPolicy"] {
        let names = cluster.kubectl(&["get", kind, "--output=name"]).await?.success()?.stdout;
        assert_eq!(names.lines().count(), 1, "{kind}: {names}");
    }
    cluster.finish().await
}

/// Pods come and go while mail comes in: to thirty, all anew, to none and back, and off a node that is drained. Every
/// mail has one verdict or dead letter in the end.
#[tokio::test]
async fn nothing_is_lost_while_pods_come_and_go() -> Result<()> {
    let cluster = Cluster::new(&["actor"]).await?;
    let request =
        json!([{ "op": "replace", "path": "/spec/template/spec/containers/0/resources/requests/cpu", "value": "5m" }]);
    let patches = [
        json!({ "target": { "kind": "Deployment" }, "patch": request.to_string() }),
        json!({ "target": { "kind": "RuntimeClass" }, "patch": json!([{ "op": "remove", "path": "/overhead/podFixed/cpu" }]).to_string() }),
    ];
    cluster.deploy("actor", &["disruption"], &patches).await?;
    cluster.until_ready(2).await?;

    let mut publisher = Publisher::connect(cluster.bed.server.url(), "load").await?;
    let enough = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&enough);
    let load = tokio::spawn(async move {
        let mut mails = mails(7);
        while !told.load(Ordering::Relaxed) {
            publisher.publish(mails.by_ref().take(LOAD_PER_SECOND as usize), Some(LOAD_PER_SECOND)).await?;
        }
        anyhow::Ok(publisher.sent())
    });
    cluster.scale(1).await?;
    report("from 1 to 30 pods", cluster.scale(MANY_PODS).await?);
    let start = Instant::now();
    cluster.scale(3).await?;
    cluster.kubectl(&["rollout", "restart", "deployment/triage"]).await?.success()?;
    cluster.until_ready(3).await?;
    report("from 30 to 3 pods, and those anew", start.elapsed());
    cluster.scale(MANY_PODS).await?;
    report("from 30 to 0 pods", cluster.scale(0).await?);
    report("from 0 to 1 pod", cluster.scale(1).await?);
    let node = cluster.kubernetes.node_name();
    cluster.kubernetes.kubectl(&["drain", node, "--ignore-daemonsets", "--timeout=120s"]).await?.success()?;
    assert_eq!(
        cluster.kubernetes.pods(NAMESPACE, &format!("{LABEL}&fieldSelector=spec.nodeName={node}")).await?,
        [] as [Value; 0]
    );
    cluster.kubernetes.kubectl(&["uncordon", node]).await?.success()?;
    cluster.until_ready(1).await?;
    enough.store(true, Ordering::Relaxed);
    let sent = load.await??;
    cluster.bed.settled_within(PODS_SOON).await?;
    let books = cluster.bed.books_balance(sent).await?;
    println!("{sent} mails: {} verdicts, {} dead letters", books.verdicts, books.dead());
    cluster.finish().await
}

/// A mail that finds no pod wakes one: KEDA's own trigger at its next poll, `host scaler` at once. The decisions are those of
/// the simulation, the replicas are set in a real Deployment.
#[tokio::test]
async fn a_mail_that_finds_no_pod_wakes_one() -> Result<()> {
    const MAILS: usize = 2;
    let cluster = Cluster::new(&["actor"]).await?;
    cluster.deploy("actor", &[], &[]).await?;
    cluster.until_ready(2).await?;
    cluster.scale(0).await?;
    let settings = autoscaler::Settings { cooldown: Duration::from_secs(1), ..autoscaler::Settings::default() };
    let mut means = Vec::new();
    for trigger in [Trigger::BuiltIn, Trigger::Push] {
        let mut phases = Vec::new();
        for number in 0..MAILS {
            // At different moments between two polls.
            let quiet = settings.polling_interval.mul_f64((number as f64 + 0.5) / MAILS as f64);
            phases.extend([Phase::Quiet(quiet), Phase::Burst(1), Phase::UntilZero]);
        }
        let outcome = simulate(&cluster.bed, Pods(&cluster), trigger, &settings, &phases, PODS_SOON * 6).await?;
        let latencies: Vec<Duration> = outcome.latencies.iter().map(|(_, latency)| *latency).collect();
        ensure!(latencies.len() == MAILS, "{latencies:?}");
        for latency in &latencies {
            report(&format!("from a mail that finds no pod to its verdict, by {}", trigger.name()), *latency);
        }
        means.push(latencies.iter().sum::<Duration>() / MAILS as u32);
    }
    ensure!(means[1] < means[0], "{means:?}");
    cluster.finish().await
}

/// The pods of the Deployment.
struct Pods<'a>(&'a Cluster);

impl Replicas for Pods<'_> {
    async fn scale(&mut self, wanted: u32) -> Result<()> {
        self.0.kubectl(&["scale", "deployment", TRIAGE, &format!("--replicas={wanted}")]).await?.success()?;
        Ok(())
    }

    async fn are_gone(&mut self) -> Result<bool> {
        Ok(self.0.kubernetes.pods(NAMESPACE, LABEL).await?.is_empty())
    }
}

/// A host over its memory limit is killed, said to be, and started again; a component that is none says so in
/// `kubectl describe`.
#[tokio::test]
async fn what_goes_wrong_is_shown() -> Result<()> {
    let cluster = Cluster::new(&["actor"]).await?;
    let wrong = Image::scratch("wrong", &["/wrong.wasm"]).file("/wrong.wasm", "no component");
    cluster.kubernetes.node.import(&[wrong]).await?;
    let patch = json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": { "name": TRIAGE },
        "spec": { "replicas": 1, "template": { "spec": { "containers": [{
            "name": TRIAGE,
            "args": ["--memory-max", "512MiB", "--deadline", "20s"],
            "resources": { "limits": { "memory": "64Mi" } },
        }] } } },
    });
    cluster.deploy("actor", &[], &[json!({ "patch": patch.to_string() })]).await?;
    cluster.until_ready(1).await?;
    cluster.bed.tell(["hoard"]).await?;
    let state = async || {
        let pods = cluster.kubernetes.pods(NAMESPACE, LABEL).await?;
        Ok(pods[0]["status"]["containerStatuses"][0].clone())
    };
    let killed = |state: &Value| {
        state["lastState"]["terminated"]["reason"] == "OOMKilled" && state["restartCount"].as_u64() > Some(0)
    };
    let state = eventually(PODS_SOON, "killed for its memory, and started again", state, killed).await?;
    assert_eq!(state["lastState"]["terminated"]["exitCode"], 137, "{state}");
    let described = cluster.kubectl(&["describe", "pod", "--selector", LABEL]).await?.success()?.stdout;
    assert!(described.contains("OOMKilled"), "{described}");

    cluster.kubectl(&["set", "image", "deployment/triage", "triage=mailroom.local/wrong:1"]).await?.success()?;
    let describe = async || Ok(cluster.kubectl(&["describe", "pod", "--selector", LABEL]).await?.success()?.stdout);
    let said = |text: &String| text.contains("StartError") && text.contains("/wrong.wasm: ");
    let described = eventually(PODS_SOON, "the reason", describe, said).await?;
    let reason = described.lines().find(|line| line.contains("/wrong.wasm: ")).unwrap_or_default();
    println!("said of a component that is none: {}", reason.trim());
    cluster.finish().await
}

/// A definition for objects that an operator would bring.
fn definition(group: &str, version: &str, kind: &str, plural: &str) -> String {
    let schema = json!({ "type": "object", "x-kubernetes-preserve-unknown-fields": true });
    let definition = json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": { "name": format!("{plural}.{group}") },
        "spec": {
            "group": group,
            "names": { "kind": kind, "plural": plural, "singular": kind.to_lowercase() },
            "scope": "Namespaced",
            "versions": [
                { "name": version, "served": true, "storage": true, "schema": { "openAPIV3Schema": schema } },
            ],
        },
    });
    definition.to_string()
}

/// Copies a folder with all in it.
fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in from.read_dir()?.flatten() {
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        if from.is_dir() {
            copy(&from, &to)?;
        } else {
            fs::copy(&from, &to).map(drop)?;
        }
    }
    Ok(())
}

/// Prints what was measured.
fn report(what: &str, time: Duration) {
    println!("{what}: {:.1} s", time.as_secs_f64());
}
