//! `shim/deploy`: renders, is what Kubernetes knows, and gives pods no more than they need.

use crate::documents::flags_in;
use external_scaler::ScaledObjectRef;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use tests::Scaler;
use tests::bed::SOON;
use tests::page::{Block, Page};
use tests::prelude::*;

/// Versions of Kubernetes whose schemas the manifests are checked against: the oldest that has all that they use, and
/// newer ones.
pub(crate) const KUBERNETES: [&str; 3] = ["1.25", "1.30", "1.35"];

/// What is optional.
const COMPONENTS: [&str; 5] = ["credentials", "disruption", "keda", "monitoring", "node"];

/// Kinds that are not Kubernetes' own, which its schemas do not have.
const OTHERS: [&str; 3] = ["ScaledObject", "PodMonitor", "PrometheusRule"];

pub(crate) fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../shim/deploy")
}

/// The base with these components, in a namespace, as `kubectl kustomize` renders it.
async fn rendered(components: &[&str]) -> Result<String> {
    // Kustomize takes no absolute paths.
    let folder = tempfile::tempdir_in(deploy())?;
    let of_components: String = components.iter().map(|name| format!("\n  - ../components/{name}")).collect();
    let mut text = "namespace: mail\nresources:\n  - ../base\n".to_owned();
    if !components.is_empty() {
        text += &format!("components:{of_components}\n");
    }
    fs::write(folder.path().join("kustomization.yaml"), text)?;
    kustomize(folder.path()).await
}

pub(crate) async fn kustomize(folder: &Path) -> Result<String> {
    Ok(command::run(tools::kubectl()?, ["kustomize".as_ref(), folder], b"", SOON).await?.success()?.stdout)
}

/// What the example of the page renders to.
async fn of_the_page() -> Result<String> {
    example("mail/kustomization.yaml").await
}

/// What that of the file `name` renders to.
pub(crate) async fn example(name: &str) -> Result<String> {
    let page = Page::read("docs/kubernetes.md")?;
    let of_name = |block: &&Block| block.tag == "yaml" && block.file().is_ok_and(|file| file == name);
    let example = page.blocks.iter().find(of_name).with_context(|| format!("an example {name}"))?;
    let folder = tempfile::tempdir_in(deploy())?;
    fs::write(folder.path().join("kustomization.yaml"), example.text.replace("../shim/deploy/", "../"))?;
    kustomize(folder.path()).await
}

/// What the example of the page about scaling renders to, with a login.
async fn scaling() -> Result<String> {
    let page = Page::read("docs/scaling.md")?;
    let example = page.blocks.iter().find(|block| block.tag == "yaml").context("an example")?;
    let text = example.text.replace("../shim/deploy/", "../");
    let folder = tempfile::tempdir_in(deploy())?;
    let with = text.replacen("components:\n", "components:\n  - ../components/credentials\n", 1);
    ensure!(with != text, "the example has no components");
    fs::write(folder.path().join("kustomization.yaml"), with)?;
    kustomize(folder.path()).await
}

/// The objects in a text of YAML.
pub(crate) async fn objects(yaml: &str) -> Result<Vec<Value>> {
    let program = "import json, sys, yaml\nprint(json.dumps(list(yaml.safe_load_all(sys.stdin))))";
    let json = python(&["-c", program], yaml).await?.success()?.stdout;
    Ok(serde_json::from_str(&json)?)
}

/// Python with the module kubernetes-validate.
async fn python(args: &[&str], input: &str) -> Result<Output> {
    let modules = format!("PYTHONPATH={}", tools::kubernetes_validate()?.display());
    let args = [modules.as_str(), "python3"].into_iter().chain(args.iter().copied());
    command::run("/usr/bin/env", args, input.as_bytes(), SOON).await
}

pub(crate) fn of_kind<'a>(objects: &'a [Value], kind: &str) -> Result<&'a Value> {
    objects.iter().find(|object| object["kind"] == kind).with_context(|| format!("no {kind}"))
}

/// Fails when a version of Kubernetes does not know what is in these manifests; `what` says which they are.
pub(crate) async fn ensure_known(what: &str, yaml: &str) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("rendered.yaml");
    fs::write(&file, yaml)?;
    let file = file.to_str().context("a path in UTF-8")?;
    for version in KUBERNETES {
        let args = ["-m", "kubernetes_validate", "--strict", "--quiet", "-k", version, file];
        let checked = python(&args, "").await?.success().with_context(|| format!("{what}, Kubernetes {version}"))?;
        let unknown = checked.stdout.lines().chain(checked.stderr.lines());
        for line in unknown.filter(|line| !line.trim().is_empty()) {
            let known = OTHERS.iter().any(|kind| line.contains(&format!("schema for kind {kind} ")));
            ensure!(known, "{what}, Kubernetes {version}: {line}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn manifests_are_what_kubernetes_knows() -> Result<()> {
    let mut all = vec![("the example".to_owned(), of_the_page().await?)];
    all.push(("the nodes' part".to_owned(), example("node/kustomization.yaml").await?));
    all.push(("the scaler's part".to_owned(), scaling().await?));
    for components in COMPONENTS.chunks(1).chain([&[][..], &COMPONENTS[..]]) {
        all.push((format!("{components:?}"), rendered(components).await?));
    }
    for (what, text) in all {
        ensure_known(&what, &text).await?;
    }
    // The check can fail.
    let wrong = rendered(&[]).await?.replace("restartPolicy:", "restartPolity:");
    ensure!(ensure_known("", &wrong).await.is_err(), "a field that does not exist passes");
    Ok(())
}

/// Every pod meets the profile "restricted" of the Pod Security Standards, and has neither a token nor other people's
/// variables.
#[tokio::test]
async fn pods_are_restricted() -> Result<()> {
    let mut all = objects(&rendered(&COMPONENTS).await?).await?;
    let mut of_scaling = objects(&scaling().await?).await?;
    of_scaling.retain(|object| object["metadata"]["name"] == "mailroom-scaler");
    all.append(&mut of_scaling);
    let mut pods = 0;
    for object in &all {
        let Some(pod) = object.pointer("/spec/template/spec") else { continue };
        pods += 1;
        let name = &object["metadata"]["name"];
        for (pointer, wanted) in [
            ("/automountServiceAccountToken", Value::Bool(false)),
            ("/enableServiceLinks", Value::Bool(false)),
            ("/securityContext/runAsNonRoot", Value::Bool(true)),
            ("/securityContext/seccompProfile/type", "RuntimeDefault".into()),
        ] {
            ensure!(pod.pointer(pointer) == Some(&wanted), "{name}: {pointer} is not {wanted}");
        }
        for absent in ["hostNetwork", "hostPID", "hostIPC"] {
            ensure!(pod.get(absent).is_none(), "{name}: {absent}");
        }
        for volume in pod["volumes"].as_array().into_iter().flatten() {
            ensure!(volume.get("secret").is_some(), "{name}: {volume}");
        }
        for container in pod["containers"].as_array().context("containers")? {
            for (pointer, wanted) in [
                ("/securityContext/allowPrivilegeEscalation", Value::Bool(false)),
                ("/securityContext/readOnlyRootFilesystem", Value::Bool(true)),
                ("/securityContext/capabilities/drop/0", "ALL".into()),
            ] {
                ensure!(container.pointer(pointer) == Some(&wanted), "{name}: {pointer} is not {wanted}");
            }
            for wanted in ["/resources/requests/cpu", "/resources/requests/memory", "/resources/limits/memory"] {
                ensure!(container.pointer(wanted).is_some(), "{name}: no {wanted}");
            }
        }
    }
    ensure!(pods == 3, "{pods} pods");
    Ok(())
}

/// What the objects say of each other is so: labels, ports, names; and every variable is one of the host's.
#[tokio::test]
async fn objects_fit_together() -> Result<()> {
    let objects = objects(&rendered(&COMPONENTS).await?).await?;
    let deployment = of_kind(&objects, "Deployment")?;
    let labels = &deployment["spec"]["template"]["metadata"]["labels"];
    let pod = &deployment["spec"]["template"]["spec"];
    ensure!(pod["runtimeClassName"] == of_kind(&objects, "RuntimeClass")?["metadata"]["name"]);
    ensure!(deployment["spec"].get("replicas").is_none(), "KEDA and the manifest both say how many");
    for (kind, selector) in [
        ("Service", "/spec/selector"),
        ("NetworkPolicy", "/spec/podSelector/matchLabels"),
        ("PodDisruptionBudget", "/spec/selector/matchLabels"),
        ("PodMonitor", "/spec/selector/matchLabels"),
    ] {
        let selector = of_kind(&objects, kind)?.pointer(selector).and_then(Value::as_object).context(kind)?;
        ensure!(!selector.is_empty() && selector.iter().all(|(key, value)| labels[key] == *value), "{kind}");
    }
    let scaled = of_kind(&objects, "ScaledObject")?;
    ensure!(scaled["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]);
    let trigger = &scaled["spec"]["triggers"][0];
    ensure!(trigger["type"] == "nats-jetstream");
    for field in trigger["metadata"].as_object().context("metadata")?.keys() {
        let known =
            ["natsServerMonitoringEndpoint", "account", "stream", "consumer", "lagThreshold", "activationLagThreshold"];
        ensure!(known.contains(&field.as_str()), "KEDA does not know {field}");
    }

    let port = &pod["containers"][0]["ports"][0];
    ensure!(of_kind(&objects, "Service")?["spec"]["ports"][0]["targetPort"] == port["name"]);
    ensure!(of_kind(&objects, "PodMonitor")?["spec"]["podMetricsEndpoints"][0]["port"] == port["name"]);
    let listen = format!("0.0.0.0:{}", port["containerPort"]);
    ensure!(pod["containers"][0]["env"][0] == json!({ "name": "MAILROOM_LISTEN", "value": listen }));

    let mut flags = flags_in(&command::host(["run", "--help"]).await?.success()?.stdout);
    let grace = flags.iter().find(|flag| flag.variable == "MAILROOM_GRACE").context("the grace period")?;
    let grace: u64 = grace.default.trim_end_matches('s').parse()?;
    let given = pod["terminationGracePeriodSeconds"].as_u64().context("seconds")?;
    ensure!(given > grace, "no time for a grace of {grace} s");
    flags.extend(flags_in(&command::host(["provision", "--help"]).await?.success()?.stdout));
    let of_containers = pod["containers"][0]["env"].as_array().into_iter().flatten();
    let variables = of_containers.filter_map(|variable| variable["name"].as_str()).map(str::to_owned);
    let settings = of_kind(&objects, "ConfigMap")?["data"].as_object().context("data")?;
    for variable in settings.keys().cloned().chain(variables) {
        ensure!(flags.iter().any(|flag| flag.variable == variable), "the host knows no {variable}");
    }
    Ok(())
}

/// KEDA reaches the scaler by the name that the trigger has, and the scaler knows every key of it and every variable.
#[tokio::test]
async fn the_scaler_fits_its_trigger() -> Result<()> {
    let objects = objects(&scaling().await?).await?;
    let find = |kind: &str, name: &str| {
        let found = objects.iter().find(|object| object["kind"] == kind && object["metadata"]["name"] == name);
        found.with_context(|| format!("no {kind} {name}"))
    };
    let scaled = find("ScaledObject", "triage")?;
    let hosts = find("Deployment", scaled["spec"]["scaleTargetRef"]["name"].as_str().context("a target")?)?;
    ensure!(hosts["spec"].get("replicas").is_none(), "KEDA and the manifest both say how many");
    let trigger = &scaled["spec"]["triggers"][0];
    ensure!(trigger["type"] == "external-push");
    let address = trigger["metadata"]["scalerAddress"].as_str().context("an address")?;
    let (host, port) = address.split_once(':').context("a port")?;
    let (name, namespace) = host.split_once('.').context("a namespace")?;
    let service = find("Service", name)?;
    ensure!(service["metadata"]["namespace"] == namespace, "{service}");
    ensure!(service["spec"]["ports"][0]["port"].as_u64() == Some(port.parse()?), "{service}");

    let deployment = find("Deployment", name)?;
    let labels = &deployment["spec"]["template"]["metadata"]["labels"];
    for (object, selector) in
        [(service, "/spec/selector"), (find("NetworkPolicy", name)?, "/spec/podSelector/matchLabels")]
    {
        let selector = object.pointer(selector).and_then(Value::as_object).context("a selector")?;
        ensure!(!selector.is_empty() && selector.iter().all(|(key, value)| labels[key] == *value), "{object}");
    }
    let container = &deployment["spec"]["template"]["spec"]["containers"][0];
    ensure!(container["volumeMounts"][0]["mountPath"] == "/etc/nats", "no credentials: {container}");
    ensure!(container["ports"][0]["name"] == service["spec"]["ports"][0]["targetPort"]);
    let listen = format!("0.0.0.0:{}", container["ports"][0]["containerPort"]);
    ensure!(container["env"][0] == json!({ "name": "MAILROOM_GRPC_LISTEN", "value": listen }));
    let flags = flags_in(&command::host(["scaler", "--help"]).await?.success()?.stdout);
    let of_container = container["env"].as_array().into_iter().flatten();
    let variables = of_container.filter_map(|variable| variable["name"].as_str());
    for variable in variables.chain(["MAILROOM_SERVER", "MAILROOM_CREDS"]) {
        ensure!(flags.iter().any(|flag| flag.variable == variable), "the scaler knows no {variable}");
    }

    let server = NatsServer::start().await?;
    command::host(["provision", "--server", server.url()]).await?.success()?;
    let scaler = Scaler::ready(server.url()).await?;
    let metadata = trigger["metadata"].as_object().context("metadata")?.iter();
    let text = |value: &Value| value.as_str().map(str::to_owned).context("metadata is text");
    let metadata = metadata.map(|(key, value)| Ok((key.clone(), text(value)?))).collect::<Result<_>>()?;
    let object = ScaledObjectRef { scaler_metadata: metadata, ..ScaledObjectRef::default() };
    ensure!(!scaler.client().await?.is_active(object).await?.into_inner().result, "active without messages");
    Ok(())
}

/// What writes to nodes is apart, may enter their root and nothing else, and goes to the nodes that pods go to.
#[tokio::test]
async fn the_installer_has_one_capability() -> Result<()> {
    let objects = objects(&example("node/kustomization.yaml").await?).await?;
    let set = of_kind(&objects, "DaemonSet")?;
    ensure!(set["metadata"]["namespace"] == of_kind(&objects, "Namespace")?["metadata"]["name"]);
    let pod = &set["spec"]["template"]["spec"];
    ensure!(pod["automountServiceAccountToken"] == false && pod["enableServiceLinks"] == false, "{pod}");
    for absent in ["hostNetwork", "hostPID", "hostIPC"] {
        ensure!(pod.get(absent).is_none(), "{absent}");
    }
    for container in [&pod["initContainers"][0], &pod["containers"][0]] {
        let security = json!({
            "allowPrivilegeEscalation": false,
            "readOnlyRootFilesystem": true,
            "capabilities": { "drop": ["ALL"], "add": ["SYS_CHROOT"] },
        });
        ensure!(container["securityContext"] == security, "{container}");
    }
    let rendered = self::objects(&rendered(&["node"]).await?).await?;
    ensure!(of_kind(&rendered, "RuntimeClass")?["scheduling"]["nodeSelector"] == pod["nodeSelector"], "other nodes");
    Ok(())
}

/// The example runs the images that the page makes, with the runtime that it has containerd configured with.
#[tokio::test]
async fn the_page_fits_the_manifests() -> Result<()> {
    let page = Page::read("docs/kubernetes.md")?;
    let objects = objects(&of_the_page().await?).await?;
    let of_tag = |tag: &'static str| page.blocks.iter().filter(move |block| block.tag == tag);
    for kind in ["Deployment", "Job"] {
        let image = of_kind(&objects, kind)?["spec"]["template"]["spec"]["containers"][0]["image"].clone();
        let made = format!("--name {} ", image.as_str().context("an image")?);
        ensure!(of_tag("sh").any(|block| block.text.contains(&made)), "the page makes no image {image}");
    }
    let handler = of_kind(&objects, "RuntimeClass")?["handler"].as_str().context("a handler")?;
    let runtime = format!("runtimes.{handler}]");
    ensure!(of_tag("toml").any(|block| block.text.contains(&runtime)), "no runtime {handler} for containerd");
    for object in &objects {
        let (kind, name) = (&object["kind"], &object["metadata"]["name"]);
        let said = format!("{} `{}`", kind.as_str().unwrap_or_default(), name.as_str().unwrap_or_default());
        ensure!(page.prose.contains(&said) || kind == "PodDisruptionBudget", "the page has no {said}");
    }
    Ok(())
}

#[test]
fn alert_rules_are_those_of_the_page() -> Result<()> {
    let page = Page::read("docs/operating.md")?;
    let rules = page.blocks.iter().find(|block| block.tag == "yaml").context("a block of rules")?;
    let file = fs::read_to_string(deploy().join("components/monitoring/prometheusrule.yaml"))?;
    let (_, spec) = file.split_once("\nspec:\n").context("no spec")?;
    let indented: String = rules.text.lines().map(|line| format!("  {line}\n")).collect();
    ensure!(spec == indented, "{spec}");
    Ok(())
}
