//! The harness checks itself, with containerd's own handler.

use k8s_cri::v1::ContainerState;
use shim_tests::cgroup::Limits;
use shim_tests::prelude::*;

/// A pod of containerd's own runtime lives and goes as a kubelet wants it, and nothing is left of it.
#[tokio::test]
async fn a_pod_of_runc_starts_logs_ends_and_leaves_nothing() -> Result<()> {
    let node = Node::start().await?;
    let limits = Limits { memory: 64 << 20, millicores: 500 };
    let pod = node.pod_of(RUNC).limits(limits).hostname("mail-0").dns("198.18.0.53", &["svc.test"]).run().await?;
    assert_eq!(node.shims().len(), 1);

    let container = pod.container("sidecar").args(["report"]).env("COLOUR", "blue").start().await?;
    let status = container.ended(SOON).await?;
    assert_eq!((status.exit_code, status.reason.as_str()), (0, "Completed"), "{:?}", container.log()?);
    let report = container.log()?.into_iter().map(|line| line.text).collect::<String>();
    let report: serde_json::Value = serde_json::from_str(&report)?;
    assert_eq!(report["environment"]["COLOUR"], "blue");
    assert_eq!(report["hostname"], "mail-0");
    assert!(report["resolv"].as_str().is_some_and(|resolv| resolv.contains("search svc.test")), "{report}");
    assert_eq!(report["status"]["CapBnd"], "0000000000000000");
    container.remove().await?;

    let container = pod.container("sidecar").args(["exit", "7"]).start().await?;
    assert_eq!(container.ended(SOON).await?.exit_code, 7);
    let container = pod.container("sidecar").args(["say", "hello"]).start().await?;
    container.wait_for_line(SOON, |line| line == "hello").await?;
    let echo = container.exec(&["/sidecar", "report"]).await?;
    assert_eq!(echo.exit_code, 0);
    assert_eq!(container.status().await?.state(), ContainerState::ContainerRunning);
    let memory = container.cgroup("memory", "memory.limit_in_bytes", "memory.max").await?;
    assert!(memory.parse::<i64>().is_err() || memory.parse::<i64>()? > limits.memory, "no limit of its own: {memory}");
    assert_eq!(container.stop(SOON).await?.exit_code, 0);
    pod.remove().await?;
    node.finish().await
}

/// A test that fails in the middle leaves nothing either.
#[tokio::test]
async fn a_node_that_is_dropped_takes_its_pods_along() -> Result<()> {
    let node = Node::start().await?;
    let pod = node.pod_of(RUNC).run().await?;
    pod.container("sidecar").args(["wait"]).start().await?;
    let folder = node.folder().to_owned();
    let name = folder.file_name().context("a folder has a name")?.to_string_lossy().into_owned();
    assert_ne!(shim_tests::leftovers::processes(&folder, &name).len(), 0);
    assert_ne!(shim_tests::leftovers::mounts("self", &folder).len(), 0);
    drop(node);
    assert_eq!(shim_tests::leftovers::processes(&folder, &name).len(), 0);
    assert_eq!(shim_tests::leftovers::mounts("self", &folder).len(), 0);
    assert!(!folder.exists(), "{} is there still", folder.display());
    for hierarchy in ["memory", ""] {
        let cgroup = std::path::Path::new("/sys/fs/cgroup").join(hierarchy).join(&name);
        assert!(!cgroup.exists(), "{} is there still", cgroup.display());
    }
    Ok(())
}

/// What remains of a pod is found: here the pod itself.
#[tokio::test]
async fn what_is_left_of_a_pod_is_noticed() -> Result<()> {
    let node = Node::start().await?;
    let pod = node.pod_of(RUNC).run().await?;
    let left = node.left();
    for kind in ["process ", "mount ", "cgroup ", "socket ", "bundle ", "1 ports"] {
        assert!(left.iter().any(|found| found.starts_with(kind)), "no {kind}in {left:?}");
    }
    pod.remove().await?;
    node.finish().await
}
