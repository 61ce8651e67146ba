//! What a container may use, and what it does use.

use crate::site::{Site, running};
use k8s_cri::v1::{ContainerState, LinuxContainerResources};
use shim_tests::cgroup::Limits;
use shim_tests::prelude::*;

const MIB: i64 = 1 << 20;

/// A guest that takes more memory than its container may have: the container ends, and Kubernetes shows why.
#[tokio::test]
async fn a_container_out_of_memory_is_killed_and_said_to_be() -> Result<()> {
    let site = Site::new().await?;
    let pod = site.node.pod().limits(Limits { memory: 128 * MIB, millicores: 0 }).run().await?;
    let sidecar = pod.container("sidecar").args(["wait"]).start().await?;
    let container = site.host(&pod, "actor").args(["--memory-max", "512MiB", "--deadline", "20s"]);
    let container = container.resources(|resources| resources.memory_limit_in_bytes = 64 * MIB).start().await?;
    running(&container).await?;
    site.bed.tell(["hoard"]).await?;
    let status = container.ended(SOON).await?;
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"));
    assert_eq!(sidecar.status().await?.state(), ContainerState::ContainerRunning);
    let sidecar = pod.container("sidecar").args(["eat", "100"]);
    let sidecar = sidecar.resources(|resources| resources.memory_limit_in_bytes = 32 * MIB).start().await?;
    let status = sidecar.ended(SOON).await?;
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"));
    site.finish().await
}

/// A container with little memory has few slots by default: what they keep for the next messages fits in half of it.
#[tokio::test]
async fn slots_fit_the_memory_limit() -> Result<()> {
    let site = Site::new().await?;
    let pod = site.node.pod().run().await?;
    let container = site.host(&pod, "triage");
    let container = container.resources(|resources| resources.memory_limit_in_bytes = 32 * MIB).start().await?;
    running(&container).await?;
    let metrics = http::get(&format!("http://{}:9464/metrics", pod.address().await?)).await?.body;
    assert_eq!(Metrics::parse(&metrics)?.get("mailroom_slots", &[]), Some(64.0));
    container.stop(SOON).await?;
    pod.remove().await?;
    site.finish().await
}

/// `kubectl top` has figures: processor time that grows with the work, and memory.
#[tokio::test]
async fn usage_is_reported() -> Result<()> {
    let site = Site::new().await?;
    let pod = site.node.pod().run().await?;
    let container = site.host(&pod, "actor").start().await?;
    running(&container).await?;
    let usage = async || {
        let stats = container.stats().await?;
        let memory = stats.memory.and_then(|memory| memory.working_set_bytes).context("no memory")?.value;
        let time = stats.cpu.and_then(|cpu| cpu.usage_core_nano_seconds).context("no processor time")?.value;
        anyhow::Ok((Duration::from_nanos(time), memory))
    };
    let (before, memory) = usage().await?;
    assert!(before > Duration::ZERO && memory > MIB as u64, "{before:?}, {memory} bytes");
    // Time by the clock, of which a busy machine gives it a share.
    site.bed.tell(["spin 400"; 3]).await?;
    site.bed.one_verdict_each(3).await?;
    let look = async || Ok(usage().await?.0);
    eventually(SOON, "the work is counted", look, |after| *after > before + Duration::from_millis(100)).await?;
    site.finish().await
}

/// Limits that are changed while a pod runs hold at once.
#[tokio::test]
async fn limits_change_while_it_runs() -> Result<()> {
    let site = Site::new().await?;
    let pod = site.node.pod().run().await?;
    let container = site.host(&pod, "actor").resources(|resources| {
        resources.memory_limit_in_bytes = 100 * MIB;
        (resources.cpu_period, resources.cpu_quota) = (100_000, 50_000);
    });
    let container = container.start().await?;
    running(&container).await?;
    let memory = async || container.cgroup("memory", "memory.limit_in_bytes", "memory.max").await;
    let processor = async || container.cgroup("cpu", "cpu.cfs_quota_us", "cpu.max").await;
    assert_eq!(memory().await?, (100 * MIB).to_string());
    assert!(processor().await?.starts_with("50000"));
    let resources = LinuxContainerResources {
        memory_limit_in_bytes: 200 * MIB,
        cpu_period: 100_000,
        cpu_quota: 75_000,
        ..Default::default()
    };
    container.update(resources).await?;
    assert_eq!(memory().await?, (200 * MIB).to_string());
    assert!(processor().await?.starts_with("75000"));
    site.bed.tell(["verdict support"]).await?;
    site.bed.verdicts(1).await?;
    site.finish().await
}
