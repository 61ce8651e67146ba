//! What happens around a pod: containerd restarts, the shim dies, the server is away.

use crate::lifecycle::number;
use crate::site::{Site, running};
use k8s_cri::v1::ContainerState;
use shim_tests::prelude::*;

/// containerd is restarted under running pods, as an upgrade does: they go on, no line of their logs is lost, and
/// their ends are seen, even one that comes while containerd is away.
#[tokio::test]
async fn pods_outlive_containerd() -> Result<()> {
    let site = Site::new().await?;
    let pod = site.node.pod().run().await?;
    let container = site.host(&pod, "actor").args(["--shards", "1", "--slots", "1"]).start().await?;
    let counting = pod.container("sidecar").args(["count", "1"]).start().await?;
    let ending = pod.container("sidecar").args(["wait"]).start().await?;
    running(&container).await?;
    counting.wait_for_line(SOON, |line| line == "100").await?;
    let mut printed = 0;
    let (pid, ending_pid) = (container.pid().await?, ending.pid().await?);
    for _ in 0..2 {
        let print = async |from: usize| {
            site.bed.tell((from..from + 100).map(|number| format!("print number {number}."))).await?;
            site.bed.verdicts(from + 100).await.map(drop)
        };
        print(printed).await?;
        let last = printed + 99;
        container.wait_for_line(SOON, |line| number(line) == Some(last)).await?;
        site.node.kill_containerd();
        print(printed + 100).await?;
        if std::path::Path::new(&format!("/proc/{ending_pid}")).exists() {
            kill(ending_pid, Signal::TERM)?;
        }
        site.node.start_containerd().await?;
        printed += 200;
        let last = printed - 1;
        container.wait_for_line(SOON, |line| number(line) == Some(last)).await?;
        assert_eq!(container.pid().await?, pid);
        assert_eq!(ending.ended(SOON).await?.exit_code, 0);
    }
    assert_eq!(container.status().await?.state(), ContainerState::ContainerRunning);
    assert_eq!(container.stop(SOON).await?.exit_code, 0);
    let numbers: Vec<usize> = container.log()?.iter().filter_map(|line| number(&line.text)).collect();
    assert_eq!(numbers, (0..printed).flat_map(|number| [number, number]).collect::<Vec<_>>());
    assert_eq!(counting.stop(SOON).await?.exit_code, 0);
    pod.remove().await?;
    site.finish().await
}

/// The shim is killed: what it ran ends, containerd says so, and once the pod is removed nothing is left of it.
#[tokio::test]
async fn a_killed_shim_leaves_nothing() -> Result<()> {
    let site = Site::new().await?;
    let other = site.node.pod().run().await?;
    let [other_shim] = site.node.shims()[..] else { bail!("one pod has one shim: {:?}", site.node.shims()) };
    let bystander = other.container("sidecar").args(["wait"]).start().await?;
    let pod = site.node.pod().run().await?;
    let container = site.host(&pod, "actor").start().await?;
    let sidecar = pod.container("sidecar").args(["wait"]).start().await?;
    running(&container).await?;
    let shim = site.node.shims().into_iter().find(|&shim| shim != other_shim).context("the second pod's shim")?;
    kill(shim, Signal::KILL)?;
    for container in [&container, &sidecar] {
        let status = container.ended(SOON).await?;
        assert_ne!(status.exit_code, 0, "{status:?}");
    }
    pod.remove().await?;
    assert_eq!(bystander.status().await?.state(), ContainerState::ContainerRunning);
    other.remove().await?;
    site.node.nothing_left().await?;
    site.finish().await
}

/// The shim dies while containerd is away: containerd finds out when it is back, and nothing is left either.
#[tokio::test]
async fn a_shim_that_dies_unseen_leaves_nothing() -> Result<()> {
    let site = Site::new().await?;
    let pod = site.node.pod().run().await?;
    let container = site.host(&pod, "actor").start().await?;
    running(&container).await?;
    site.node.kill_containerd();
    for shim in site.node.shims() {
        kill(shim, Signal::KILL)?;
    }
    site.node.start_containerd().await?;
    assert_ne!(container.ended(SOON).await?.exit_code, 0);
    pod.remove().await?;
    site.node.nothing_left().await?;
    site.finish().await
}

/// A pod that starts before its server is not ready, says why, tries again and gets there by itself.
#[tokio::test]
async fn a_pod_waits_for_its_server() -> Result<()> {
    let mut site = Site::new().await?;
    site.bed.server.stop().await?;
    let pod = site.node.pod().run().await?;
    let container = site.host(&pod, "triage").start().await?;
    let line = container.wait_for_line(SOON, |line| line.contains("trying again")).await?;
    assert!(line.contains(site.bed.server.url()), "{line}");
    let ready = format!("http://{}:9464/readyz", pod.address().await?);
    let look = async || http::get(&ready).await;
    let answer = eventually(SOON, "the probe is answered", look, |_| true).await?;
    assert_eq!(answer.status, 503, "{answer:?}");
    assert!(answer.body.contains("no connection"), "{answer:?}");
    site.bed.server.restart().await?;
    eventually(SOON, "the host is ready", look, |answer| answer.status == 200).await?;
    assert_eq!(container.status().await?.state(), ContainerState::ContainerRunning);
    site.finish().await
}

/// Sends a signal to a process.
pub fn kill(pid: u32, signal: Signal) -> Result<()> {
    let pid = rustix::process::Pid::from_raw(pid.cast_signed()).context("a process id")?;
    Ok(rustix::process::kill_process(pid, signal)?)
}
