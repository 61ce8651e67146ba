//! Starting, stopping, ending: exit codes, logs, nothing lost, nothing left.

use crate::site::{Site, running};
use futures::future::try_join_all;
use k8s_cri::v1::ContainerState;
use shim_tests::prelude::*;

/// The executables of a node say which version they are, and that they were built together.
#[tokio::test]
async fn the_executables_of_a_node_name_their_version() -> Result<()> {
    let folder = tools::shim()?;
    let mut versions = Vec::new();
    for (file, name) in [
        ("containerd-shim-mailroom-v1", "containerd-shim-mailroom-v1"),
        ("mailroom-compiler", "mailroom-compiler"),
        ("mailroom-node", "mailroom-node"),
        ("mailroom-host", "host"),
    ] {
        let version = command::version(&folder.join(file), name).await?;
        versions.push(version.trim_start_matches(name).to_owned());
    }
    ensure!(versions.iter().all(|version| *version == versions[0]), "{versions:?}");
    Ok(())
}

/// A pod that is deleted under load hands back what it has not begun: the next pod does the rest, and every mail has
/// one verdict.
#[tokio::test]
async fn a_pod_that_is_stopped_under_load_loses_nothing() -> Result<()> {
    let site = Site::new().await?;
    site.bed.tell(std::iter::repeat_n("sleep 5", 2000)).await?;
    for stored in [100, 700] {
        let pod = site.node.pod().run().await?;
        let container = site.host(&pod, "actor").args(["--slots", "8"]).start().await?;
        site.bed.verdicts(stored).await?;
        let status = container.stop(SOON).await?;
        assert_eq!((status.exit_code, status.reason.as_str()), (0, "Completed"), "{:?}", container.log()?);
        pod.remove().await?;
    }
    let pod = site.node.pod().run().await?;
    let _container = site.host(&pod, "actor").args(["--slots", "256"]).start().await?;
    site.bed.one_verdict_each(2000).await?;
    site.finish().await
}

/// A container that does not end within the pod's grace period is killed, and its mail is delivered again.
#[tokio::test]
async fn the_grace_period_of_the_pod_ends_with_a_kill() -> Result<()> {
    let site = Site::with(Settings::default(), &["--ack-wait", "20s", "--deadline", "15s"]).await?;
    let pod = site.node.pod().run().await?;
    let container = site.host(&pod, "actor").args(["--deadline", "15s"]).start().await?;
    site.bed.tell(["sleep 14000"]).await?;
    running(&container).await?;
    let metrics = format!("http://{}:9464/metrics", pod.address().await?);
    let slots = async || Ok(Metrics::parse(&http::get(&metrics).await?.body)?.get("mailroom_slots_in_use", &[]));
    eventually(SOON, "the guest runs", slots, |slots| *slots == Some(1.0)).await?;
    let status = container.stop(Duration::from_secs(1)).await?;
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "Error"));
    assert!(container.log()?.iter().any(|line| line.text.contains("draining")), "{:?}", container.log()?);
    site.finish().await
}

/// Everything that is printed is in the log, in order, whatever its length, when the container has ended.
#[tokio::test]
async fn the_log_is_whole() -> Result<()> {
    let site = Site::new().await?;
    let pod = site.node.pod().run().await?;
    let container = site.host(&pod, "actor").args(["--shards", "1", "--slots", "1"]).start().await?;
    running(&container).await?;
    // Longer than the 16 KiB that containerd takes for a line.
    site.bed.tell([format!("print long {}", "x".repeat(20_000))]).await?;
    site.bed.tell((0..500).map(|number| format!("print number {number}."))).await?;
    site.bed.one_verdict_each(501).await?;
    assert_eq!(container.stop(SOON).await?.exit_code, 0);
    let log = container.log()?;
    let numbers: Vec<usize> = log.iter().filter_map(|line| number(&line.text)).collect();
    // Each is printed to standard output and to standard error.
    assert_eq!(numbers, (0..500).flat_map(|number| [number, number]).collect::<Vec<_>>());
    assert!(log.last().is_some_and(|line| line.text.contains("\"drained\"")), "{:?}", log.last());
    site.finish().await
}

/// The number in a line of the actor's, `… number N. …`.
pub fn number(line: &str) -> Option<usize> {
    line.split_once("number ")?.1.split_once('.')?.0.parse().ok()
}

/// `ctr task pause` stops a component where it is, and it goes on where it was.
#[tokio::test]
async fn a_component_is_paused_and_resumed() -> Result<()> {
    let site = Site::new().await?;
    let pod = site.node.pod().run().await?;
    let container = site.host(&pod, "actor").start().await?;
    running(&container).await?;
    site.node.ctr(&["task", "pause", container.id()]).await?.success()?;
    let tasks = site.node.ctr(&["task", "list"]).await?.success()?.stdout;
    let task = tasks.lines().find(|line| line.starts_with(container.id())).context("the task is listed")?;
    assert!(task.contains("PAUSED"), "{task}");
    // Nothing of it moves: the kernel's own word on the whole cgroup.
    let frozen = container.cgroup("freezer", "freezer.state", "cgroup.freeze").await?;
    assert!(["FROZEN", "1"].contains(&frozen.as_str()), "{frozen}");
    site.bed.tell(["verdict support"]).await?;
    assert_eq!(streams::count(&site.bed.jetstream, streams::VERDICTS).await?, 0);
    site.node.ctr(&["task", "resume", container.id()]).await?.success()?;
    site.bed.one_verdict_each(1).await?;
    assert_eq!(container.stop(SOON).await?.exit_code, 0);
    site.finish().await
}

/// Fifty pods come and go, ten at a time, and nothing is left of any: no process, no mount, no cgroup, no socket.
#[tokio::test]
async fn fifty_pods_leave_nothing() -> Result<()> {
    let site = Site::new().await?;
    let one = async |number: usize| {
        let pod = site.node.pod().run().await?;
        let container = site.host(&pod, "triage").args(["--shards", "1"]).start().await?;
        running(&container).await?;
        // As a pod is deleted, or a node is drained in a hurry.
        if number.is_multiple_of(2) {
            assert_eq!(container.stop(SOON).await?.exit_code, 0);
            container.remove().await?;
        }
        pod.remove().await
    };
    for batch in 0..5 {
        try_join_all((0..10).map(|number| one(10 * batch + number))).await?;
    }
    site.node.nothing_left().await?;
    site.finish().await
}

/// A container that was created and never started goes without a trace.
#[tokio::test]
async fn a_container_that_never_ran_leaves_nothing() -> Result<()> {
    let node = crate::site::node().await?;
    let pod = node.pod().run().await?;
    let container = pod.container("triage").create().await?;
    assert_eq!(container.status().await?.state(), ContainerState::ContainerCreated);
    container.remove().await?;
    pod.remove().await?;
    node.nothing_left().await?;
    node.finish().await
}

/// Without Kubernetes: `ctr run` prints what the host does and ends with its exit code.
#[tokio::test]
async fn ctr_runs_a_component_by_hand() -> Result<()> {
    let site = Site::new().await?;
    let actor = ["mailroom.local/actor:1", "by-hand", "/actor.wasm"];
    let by_hand = async |args: &[&str]| site.node.run_by_hand(&[&actor[..], args].concat(), b"").await;
    let help = by_hand(&["--help"]).await?.success()?;
    assert!(help.stdout.contains("Usage: host run"), "{help:?}");
    let wrong = by_hand(&["--shards", "none"]).await?;
    assert_eq!(wrong.code(), Some(2), "{wrong:?}");
    assert!(wrong.stderr.contains("--shards"), "{wrong:?}");

    site.bed.tell(["verdict support"]).await?;
    let stop = async {
        let verdicts = site.bed.verdicts(1).await;
        site.node.ctr(&["task", "kill", "--signal", "SIGTERM", "by-hand"]).await?.success()?;
        verdicts
    };
    let args = ["--server", site.bed.server.url(), "--listen", "none"];
    let (hand, verdicts) = tokio::join!(by_hand(&args), stop);
    assert_eq!(verdicts?.len(), 1);
    let hand = hand?;
    assert_eq!(hand.code(), Some(0), "{hand:?}");
    assert!(hand.stderr.contains("drained"), "{hand:?}");
    assert_eq!(site.node.ctr(&["container", "list", "--quiet"]).await?.success()?.stdout, "");
    site.finish().await
}

/// A sidecar reads what it is sent, from a pipe until its end, and from a terminal if it asked for one.
#[tokio::test]
async fn a_sidecar_has_its_input() -> Result<()> {
    let node = Node::start().await?;
    let sidecar = ["mailroom.local/sidecar:1", "by-hand", "/sidecar"];
    let echo = [&sidecar[..], &["echo"]].concat();
    let long = "of some length ".repeat(10_000);
    let piped = node.run_by_hand(&echo, format!("one\ntwo\n{long}\n").as_bytes()).await?.success()?;
    assert_eq!(piped.stdout, format!("read one\nread two\nread {long}\n"));
    let terminal = node.run_at_terminal(&echo, b"three\nend\n").await?.success()?;
    assert!(terminal.stdout.contains("read three\r"), "{terminal:?}");
    let report = [&sidecar[..], &["report"]].concat();
    for (report, at_terminal) in
        [(node.run_by_hand(&report, b"").await?, false), (node.run_at_terminal(&report, b"").await?, true)]
    {
        let printed = report.success()?.stdout;
        // A terminal shows what is typed, too: here the end of the input.
        let report = printed.find('{').and_then(|start| printed.get(start..)).context("a report")?;
        let report: serde_json::Value = serde_json::from_str(report.trim())?;
        assert_eq!(report["terminal"], at_terminal);
    }
    node.finish().await
}
