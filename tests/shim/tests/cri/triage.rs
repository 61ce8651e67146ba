//! From a pod's start to verdicts, and what a pod has beside its component.

use crate::site::{Site, running};
use k8s_cri::v1::ContainerState;
use serde_json::Value;
use shim_tests::dns::NameServer;
use shim_tests::prelude::*;

/// `runtimeClassName: mailroom` and an image that is no more than a component: mail is triaged inside of the pod,
/// probes are answered, and it drains when the pod is deleted.
#[tokio::test]
async fn mail_is_triaged_in_a_pod() -> Result<()> {
    let site = Site::new().await?;
    let pod = site.node.pod().run().await?;
    let container = site.host(&pod, "triage").start().await?;
    let admin = format!("http://{}:9464", pod.address().await?);
    let ready = async || http::get(&format!("{admin}/readyz")).await;
    eventually(SOON, "the host is ready", ready, |answer| answer.status == 200).await?;
    assert_eq!(http::get(&format!("{admin}/livez")).await?.status, 200);

    let mails = tools::mails()?;
    let outage = mails.iter().find(|mail| mail.ends_with("01-outage.eml")).context("a mail about an outage")?;
    site.bed.jetstream.publish("mail.test", std::fs::read(outage)?.into()).await?.await?;
    let verdicts = site.bed.verdicts(1).await?;
    let verdict = verdicts[0].json()?;
    assert_eq!((verdict["queue"].as_str(), verdict["priority"].as_str()), (Some("operations"), Some("urgent")));
    let verdicts = async || {
        let metrics = http::get(&format!("{admin}/metrics")).await?.body;
        Ok(Metrics::parse(&metrics)?.get("mailroom_messages_total", &[("outcome", "verdict")]))
    };
    eventually(SOON, "the verdict is counted", verdicts, |verdicts| *verdicts == Some(1.0)).await?;

    let status = container.stop(SOON).await?;
    assert_eq!((status.exit_code, status.reason.as_str()), (0, "Completed"), "{:?}", container.log()?);
    let log = container.log()?;
    assert!(log.iter().any(|line| line.stream == "stderr" && line.text.contains("\"drained\"")), "{log:?}");
    assert!(log.iter().all(|line| line.text.starts_with('{')), "not JSON: {log:?}");
    container.remove().await?;
    pod.remove().await?;
    site.finish().await
}

/// The pod's `args` are the host's flags, and its environment reaches it.
#[tokio::test]
async fn arguments_and_environment_of_the_pod_are_the_hosts() -> Result<()> {
    let site = Site::new().await?;
    let pod = site.node.pod().host_network().run().await?;
    let listen = ["--listen", "none", "--shards", "1"];
    let container = site.host(&pod, "actor").args(listen).env("MAILROOM_CONFIG", "team=night").start().await?;
    running(&container).await?;
    let line = container.wait_for_line(SOON, |line| line.contains("\"running\"")).await?;
    let line: Value = serde_json::from_str(&line)?;
    assert_eq!(line["shards"], 1, "{line}");
    let words: Vec<String> = container.proc("cmdline").await?.split_terminator('\0').map(str::to_owned).collect();
    assert_eq!(words[words.len() - 4..], listen, "{words:?}");
    site.bed.tell(["config", "environment"]).await?;
    let verdicts = site.bed.verdicts(2).await?;
    let reasons = |queue: &str| {
        let verdict =
            verdicts.iter().filter_map(|verdict| verdict.json().ok()).find(|verdict| verdict["queue"] == queue);
        verdict.map(|verdict| verdict["reasons"].clone()).unwrap_or_default()
    };
    assert_eq!(reasons("config"), serde_json::json!(["team=night"]));
    // None of it is the guest's.
    assert_eq!(reasons("environment")[0], "variables: 0");
    site.finish().await
}

/// The server is named as Kubernetes names services, and found through the search domains of the pod.
#[tokio::test]
async fn a_service_is_found_by_its_short_name() -> Result<()> {
    let site = Site::new().await?;
    let address = site.node.address();
    let _names = NameServer::start(address, "nats.mail.svc.cluster.test", address).await?;
    let search = ["mail.svc.cluster.test", "svc.cluster.test"];
    let pod = site.node.pod().dns(&address.to_string(), &search).run().await?;
    let port = site.bed.server.url().rsplit(':').next().context("a port")?;
    let server = format!("nats://nats:{port}");
    let container = pod.container("triage").args(["--server", &server]).start().await?;
    let line = container.wait_for_line(SOON, |line| line.contains("\"running\"")).await?;
    assert!(line.contains(&server), "{line}");
    site.finish().await
}

/// Secrets and ConfigMaps are files: the host reads its password from one.
#[tokio::test]
async fn a_password_comes_from_a_volume() -> Result<()> {
    let node = crate::site::node().await?;
    let extra = "authorization { users [ { user: mail, password: \"in a file\" } ] }\n".to_owned();
    let server = node.nats(Settings { extra, ..Settings::default() }).await?;
    let secret = node.folder().join("secret");
    std::fs::create_dir(&secret)?;
    std::fs::write(secret.join("password"), "in a file\n")?;
    let password = secret.join("password").to_string_lossy().into_owned();
    let login = ["--server", server.url(), "--user", "mail", "--password-file"];
    command::host([&["provision"], &login[..], &[&password]].concat()).await?.success()?;
    let pod = node.pod().run().await?;
    let container =
        pod.container("triage").volume(&secret, "/secret").args(login).args(["/secret/password"]).start().await?;
    running(&container).await?;
    node.finish().await
}

/// Several components share a pod, each with its own process; one that ends leaves the other alone.
#[tokio::test]
async fn two_components_share_a_pod() -> Result<()> {
    let site = Site::new().await?;
    let pod = site.node.pod().run().await?;
    let start = async |port: &str| {
        let listen = format!("127.0.0.1:{port}");
        let container = site.host(&pod, "actor").args(["--listen", &listen, "--max-in-flight", "16"]).start().await?;
        running(&container).await?;
        anyhow::Ok(container)
    };
    let (one, other) = (start("9001").await?, start("9002").await?);
    assert_eq!(site.node.shims().len(), 1, "one shim a pod");
    site.bed.tell((0..200).map(|number| format!("print mail {number} is here"))).await?;
    site.bed.one_verdict_each(200).await?;
    for container in [&one, &other] {
        container.wait_for_line(SOON, |line| line.contains("is here")).await?;
    }
    assert_eq!(one.stop(SOON).await?.exit_code, 0);
    assert_eq!(other.status().await?.state(), ContainerState::ContainerRunning);
    site.bed.tell(["verdict support"]).await?;
    site.bed.one_verdict_each(201).await?;
    assert_eq!(other.stop(SOON).await?.exit_code, 0);
    site.finish().await
}

/// A sidecar with an ordinary entrypoint finds itself as it does under runc.
#[tokio::test]
async fn a_sidecar_is_as_it_is_under_runc() -> Result<()> {
    let node = crate::site::node().await?;
    let mut reports = Vec::new();
    for handler in [RUNC, MAILROOM] {
        let pod = node.pod_of(handler).hostname("mail-0").dns("198.18.0.53", &["svc.test"]).run().await?;
        let sidecar = pod.container("sidecar").args(["report"]).env("COLOUR", "blue").start().await?;
        assert_eq!(sidecar.ended(SOON).await?.exit_code, 0, "{:?}", sidecar.log()?);
        let report: Value = serde_json::from_str(&sidecar.log()?.first().context("a report")?.text)?;
        reports.push(comparable(report)?);
        pod.remove().await?;
    }
    assert_eq!(reports[0], reports[1]);
    node.finish().await
}

/// A report without what differs between any two containers.
fn comparable(mut report: Value) -> Result<Value> {
    let status = report["status"].as_object_mut().context("a status")?;
    status.retain(|field, _| {
        let kept = ["Name", "Uid", "Gid", "Groups", "NoNewPrivs", "Seccomp", "Seccomp_filters", "Pid", "PPid", "NSpid"];
        kept.contains(&field.as_str()) || field.starts_with("Cap") || field.starts_with("Sig")
    });
    for mount in report["mounts"].as_array_mut().context("mounts")? {
        // What is mounted, and how; the options of overlayfs name folders by numbers.
        let fields: Vec<&str> = mount.as_str().unwrap_or_default().split(' ').collect();
        let options = fields.get(3).copied().unwrap_or_default().split(',');
        let options: Vec<&str> = options.filter(|option| !option.contains("dir=")).collect();
        *mount = format!("{} {} {}", fields[1], fields[2], options.join(",")).into();
    }
    Ok(report)
}

/// `kubectl exec` works in a sidecar and is refused, in words, where there is nothing to execute.
#[tokio::test]
async fn a_command_runs_in_a_sidecar_and_in_no_component() -> Result<()> {
    let site = Site::new().await?;
    let pod = site.node.pod().run().await?;
    let sidecar = pod.container("sidecar").args(["wait"]).start().await?;
    let output = sidecar.exec(&["/sidecar", "report"]).await?;
    assert_eq!(output.exit_code, 0, "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout)?;
    assert_eq!(report["status"]["CapBnd"], "0000000000000000");
    assert_eq!(sidecar.exec(&["/sidecar", "exit", "7"]).await?.exit_code, 7);
    let missing = sidecar.exec(&["/missing"]).await.expect_err("there is no such command");
    assert!(missing.message().contains("/missing"), "{missing}");

    let container = site.host(&pod, "triage").start().await?;
    running(&container).await?;
    let refused = container.exec(&["/.mailroom/host", "--help"]).await.expect_err("a component has no commands");
    assert_eq!(refused.code(), tonic::Code::Unimplemented, "{refused}");
    assert!(refused.message().contains("exec"), "{refused}");
    assert_eq!(container.status().await?.state(), ContainerState::ContainerRunning);
    site.finish().await
}
