//! Where systemd makes the cgroups, as on most nodes.

use crate::interrupted::kill;
use crate::site::{Site, running, with_images};
use k8s_cri::v1::{ContainerState, LinuxContainerResources};
use shim_tests::cgroup::{Limits, systemctl};
use shim_tests::prelude::*;
use std::path::Path;

const MIB: i64 = 1 << 20;

/// A node whose cgroups systemd makes, and its server.
async fn site() -> Result<Site> {
    Site::on(with_images(Node::start_with_systemd().await?).await?, Settings::default(), &[]).await
}

/// The scope that a container is in, as a path; it is the one that a kubelet looks for.
async fn scope(pod: &Pod<'_>, container: &Container<'_>) -> Result<String> {
    let expected = format!("{}/cri-containerd-{}.scope", pod.cgroup(), container.id());
    assert_eq!(container.proc("cgroup").await?.trim(), format!("0::{expected}"));
    Ok(expected)
}

/// The units of containers that systemd knows, failed ones too.
fn scopes() -> Result<String> {
    systemctl(&["list-units", "--all", "--plain", "--no-legend", "cri-containerd-*"])
}

/// A container is a scope of its pod's slice, with its limits, those that come later too, whether the operator says so
/// or the path alone; and it goes with all that systemd knows of it.
#[tokio::test]
#[ignore = "systemd must be the first process; `cargo xtask test-cgroup2` runs it on such a machine"]
async fn a_container_is_a_scope_in_the_slice_of_its_pod() -> Result<()> {
    let site = site().await?;
    for handler in ["mailroom-systemd", MAILROOM] {
        let pod = site.node.pod_of(handler).limits(Limits { memory: 512 * MIB, millicores: 0 }).run().await?;
        let container = site.host(&pod, "actor").resources(|resources| {
            resources.memory_limit_in_bytes = 100 * MIB;
            (resources.cpu_period, resources.cpu_quota) = (100_000, 50_000);
        });
        let container = container.start().await?;
        let sidecar = pod.container("sidecar").args(["wait"]).start().await?;
        running(&container).await?;
        let of_container = scope(&pod, &container).await?;
        scope(&pod, &sidecar).await?;
        let limit = async |file: &str| container.cgroup("", "", file).await;
        assert_eq!(limit("memory.max").await?, (100 * MIB).to_string());
        assert_eq!(limit("cpu.max").await?, "50000 100000");
        assert_eq!(limit("../memory.max").await?, (512 * MIB).to_string());
        let resources = LinuxContainerResources { memory_limit_in_bytes: 200 * MIB, ..Default::default() };
        container.update(resources).await?;
        assert_eq!(limit("memory.max").await?, (200 * MIB).to_string());
        // Else systemd would take it back one day.
        let unit = of_container.rsplit('/').next().context("a name")?;
        let known = systemctl(&["show", "--property", "MemoryMax", unit])?;
        assert_eq!(known.trim(), format!("MemoryMax={}", 200 * MIB));
        let stats = container.stats().await?;
        let memory = stats.memory.and_then(|memory| memory.working_set_bytes).context("no memory")?.value;
        assert!(memory > MIB as u64, "{memory} bytes");
        site.bed.tell(["verdict support"]).await?;
        assert_eq!(sidecar.exec(&["/sidecar", "exit", "3"]).await?.exit_code, 3);
        assert_eq!(container.stop(SOON).await?.exit_code, 0);
        pod.remove().await?;
        site.node.nothing_left().await?;
        assert_eq!(scopes()?, "");
    }
    site.bed.one_verdict_each(2).await?;
    site.finish().await
}

/// systemd removes a scope with its last process, and the kernel's count of kills with it. The shim still says what
/// ended the container, however late it comes, and says it of no other.
#[tokio::test]
#[ignore = "systemd must be the first process; `cargo xtask test-cgroup2` runs it on such a machine"]
async fn a_scope_that_is_gone_ran_out_of_memory() -> Result<()> {
    let site = site().await?;
    let pod = site.node.pod_of("mailroom-systemd").run().await?;
    let bystander = pod.container("sidecar").args(["wait"]).start().await?;
    let killed = pod.container("sidecar").args(["wait"]).start().await?;
    let container = site.host(&pod, "actor").args(["--memory-max", "512MiB", "--deadline", "20s"]);
    let container = container.resources(|resources| resources.memory_limit_in_bytes = 64 * MIB).start().await?;
    running(&container).await?;
    let folder = format!("/sys/fs/cgroup{}", scope(&pod, &container).await?);
    let [shim] = site.node.shims()[..] else { bail!("one pod has one shim: {:?}", site.node.shims()) };
    kill(shim, Signal::STOP)?;
    site.bed.tell(["hoard"]).await?;
    let look = async || Ok(Path::new(&folder).exists());
    eventually(SOON, "systemd removes the scope", look, |exists| !exists).await?;
    kill(shim, Signal::CONT)?;
    let status = container.ended(SOON).await?;
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"));

    // Without a grace period it is killed at once.
    let status = killed.stop(Duration::ZERO).await?;
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "Error"));
    assert_eq!(bystander.status().await?.state(), ContainerState::ContainerRunning);
    let status = bystander.stop(SOON).await?;
    assert_eq!((status.exit_code, status.reason.as_str()), (0, "Completed"));

    // With nobody in the shim's way.
    let sidecar = pod.container("sidecar").args(["eat", "100"]);
    let sidecar = sidecar.resources(|resources| resources.memory_limit_in_bytes = 32 * MIB).start().await?;
    let status = sidecar.ended(SOON).await?;
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"));
    pod.remove().await?;
    site.node.nothing_left().await?;
    assert_eq!(scopes()?, "");
    site.finish().await
}

/// The shim is killed: its containers end, and systemd knows nothing of them any more.
#[tokio::test]
#[ignore = "systemd must be the first process; `cargo xtask test-cgroup2` runs it on such a machine"]
async fn a_killed_shim_leaves_no_scope() -> Result<()> {
    let site = site().await?;
    let pod = site.node.pod_of("mailroom-systemd").run().await?;
    let container = site.host(&pod, "actor").start().await?;
    running(&container).await?;
    for shim in site.node.shims() {
        kill(shim, Signal::KILL)?;
    }
    assert_ne!(container.ended(SOON).await?.exit_code, 0);
    pod.remove().await?;
    site.node.nothing_left().await?;
    assert_eq!(scopes()?, "");
    site.finish().await
}
