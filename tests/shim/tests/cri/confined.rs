//! A container has what its specification gives it and no more, seen from outside by what the kernel says.

use crate::site::{Site, running};
use k8s_cri::v1::{Capability, Int64Value};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, Timespec, Timestamps, UTIME_NOW};
use rustix::io::Errno;
use serde_json::Value;
use shim_tests::MASKED;
use shim_tests::prelude::*;
use std::collections::BTreeMap;
use std::path::Path;

/// A component in a pod that any cluster takes: nobody in particular, no capabilities and no way to get any, the
/// default seccomp filter.
#[tokio::test]
async fn a_component_has_no_privileges() -> Result<()> {
    let site = Site::new().await?;
    let pod = site.node.pod().run().await?;
    let container = site.host(&pod, "triage").security(|security| security.supplemental_groups = vec![2000]);
    let container = container.resources(|resources| resources.oom_score_adj = 500).start().await?;
    running(&container).await?;
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(container.proc_status(set).await?, "0000000000000000", "{set}");
    }
    assert_eq!(container.proc_status("Uid").await?, "65532\t65532\t65532\t65532");
    assert_eq!(container.proc_status("Gid").await?, "65532\t65532\t65532\t65532");
    assert_eq!(container.proc_status("Groups").await?, "2000 65532");
    assert_eq!(container.proc_status("NoNewPrivs").await?, "1");
    assert_eq!(container.proc_status("Seccomp").await?, "2");
    assert_eq!(container.proc("oom_score_adj").await?.trim(), "500");
    for namespace in ["mnt", "pid", "net", "ipc", "uts"] {
        let link = |process: String| std::fs::read_link(format!("/proc/{process}/ns/{namespace}"));
        assert_ne!(link(container.pid().await?.to_string())?, link("self".to_owned())?, "{namespace}");
    }
    site.finish().await
}

/// What the specification does give is there: root with one capability, a larger limit of open files, no filter.
#[tokio::test]
async fn a_component_has_the_privileges_that_it_is_given() -> Result<()> {
    let site = Site::new().await?;
    let pod = site.node.pod_of("mailroom-limits").run().await?;
    let container = site.host(&pod, "triage").security(|security| {
        let names = |name: &str| vec![name.to_owned()];
        let capabilities = (names("NET_BIND_SERVICE"), names("ALL"));
        let (add_capabilities, drop_capabilities) = capabilities;
        security.capabilities = Some(Capability { add_capabilities, drop_capabilities, ..Default::default() });
        security.run_as_user = Some(Int64Value { value: 0 });
        security.run_as_group = None;
        security.no_new_privs = false;
        security.seccomp = None;
    });
    let container = container.start().await?;
    running(&container).await?;
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        assert_eq!(container.proc_status(set).await?, "0000000000000400", "{set}");
    }
    assert_eq!(container.proc_status("Uid").await?, "0\t0\t0\t0");
    assert_eq!(container.proc_status("NoNewPrivs").await?, "0");
    assert_eq!(container.proc_status("Seccomp").await?, "0");
    let limits = container.proc("limits").await?;
    let files = limits.lines().find(|line| line.starts_with("Max open files")).context("a limit of open files")?;
    assert_eq!(files.split_whitespace().collect::<Vec<_>>()[3..5], ["1234", "2345"], "{files}");
    site.finish().await
}

/// The root is to be read only, the host and the machine code too, and what Kubernetes hides of the kernel is hidden.
#[tokio::test]
async fn a_component_sees_a_small_world_and_writes_nothing() -> Result<()> {
    let site = Site::new().await?;
    let pod = site.node.pod().run().await?;
    let container = site.host(&pod, "triage").start().await?;
    running(&container).await?;
    let mounts = container.proc("mounts").await?;
    let mounts: BTreeMap<&str, &str> =
        mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>()).map(|mount| (mount[1], mount[3])).collect();
    for path in ["/", "/.mailroom/host", "/.mailroom/component.cwasm", "/proc/sys", "/proc/bus", "/sys"] {
        let options = mounts.get(path).with_context(|| format!("{path} is not mounted: {mounts:?}"))?;
        assert!(options.split(',').any(|option| option == "ro"), "{path}: {options}");
    }
    for path in ["/.mailroom/host", "/.mailroom/component.cwasm"] {
        assert!(mounts[path].contains("nosuid") && mounts[path].contains("nodev"), "{path}: {}", mounts[path]);
    }

    let root = format!("/proc/{}/root", container.pid().await?);
    let root = Path::new(&root);
    let write = |path: &str| rustix::fs::open(root.join(path), OFlags::WRONLY | OFlags::CREATE, Mode::RUSR).map(drop);
    // A file that is being executed is refused to writers before it is looked where it lies, so its times are set.
    let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
    let now = Timestamps { last_access: now, last_modification: now };
    let touch = |path: &str| rustix::fs::utimensat(CWD, root.join(path), &now, AtFlags::empty());
    for path in ["triage.wasm", ".mailroom/host", ".mailroom/component.cwasm"] {
        assert_eq!(touch(path), Err(Errno::ROFS), "{path}");
    }
    assert_eq!(write("new"), Err(Errno::ROFS));
    let there = MASKED.iter().filter(|path| Path::new(path).exists());
    for path in there.clone() {
        let inside = root.join(path.trim_start_matches('/'));
        let hidden = if inside.is_dir() { inside.read_dir()?.count() == 0 } else { std::fs::read(inside)?.is_empty() };
        assert!(hidden, "{path} is to be seen");
    }
    assert_ne!(there.count(), 0, "this kernel has nothing to hide");
    // The image's component, what the runtime mounts, and nothing else.
    let mut names: Vec<String> = Vec::new();
    for entry in std::fs::read_dir(root)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    assert_eq!(names, [".mailroom", "dev", "etc", "proc", "sys", "triage.wasm"]);
    // Of other users' files it could only read what everyone may: the host's and the machine code's.
    for path in [".mailroom/host", ".mailroom/component.cwasm"] {
        let stat = rustix::fs::statat(CWD, root.join(path), AtFlags::empty())?;
        assert_eq!((stat.st_uid, stat.st_mode & 0o022), (0, 0), "{path}");
    }
    site.finish().await
}

/// Nothing of the environment, the open files or the folders of containerd and the shim reaches a component.
#[tokio::test]
async fn nothing_of_containerd_reaches_a_component() -> Result<()> {
    let site = Site::new().await?;
    let pod = site.node.pod().hostname("mail-0").run().await?;
    let container = site.host(&pod, "triage").env("COLOUR", "blue").start().await?;
    running(&container).await?;
    let environment = container.proc("environ").await?;
    let mut environment: Vec<&str> = environment.split_terminator('\0').collect();
    environment.sort_unstable();
    let server = format!("MAILROOM_SERVER={}", site.bed.server.url());
    let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    // Where the user is in no file of the image, runc gives it the root for its home.
    let expected = ["COLOUR=blue", "HOME=/", "HOSTNAME=mail-0", "MAILROOM_LISTEN=0.0.0.0:9464", server.as_str(), path];
    assert_eq!(environment, expected);

    let folder = format!("/proc/{}/fd", container.pid().await?);
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let Ok(target) = std::fs::read_link(entry.path()) else { continue };
        let number: u32 = entry.file_name().to_string_lossy().parse()?;
        let is_own = if number <= 2 {
            // The log is the FIFO that containerd reads.
            let kind = std::fs::metadata(entry.path())?.file_type();
            !kind.is_file() && !kind.is_dir()
        } else {
            // Sockets and the like have no path; its machine code and what the kernel says of it are its own.
            !target.starts_with("/") || target.starts_with("/proc/1") || target.starts_with("/.mailroom")
        };
        assert!(is_own, "descriptor {number} is {}", target.display());
    }
    site.finish().await
}

/// The name and the name servers are the pod's.
#[tokio::test]
async fn a_component_has_the_names_of_its_pod() -> Result<()> {
    let site = Site::new().await?;
    let address = site.node.address().to_string();
    let pod = site.node.pod().hostname("mail-0").dns(&address, &["mail.svc.test", "svc.test"]).run().await?;
    let container = site.host(&pod, "triage").start().await?;
    running(&container).await?;
    let root = format!("/proc/{}/root", container.pid().await?);
    assert_eq!(std::fs::read_to_string(format!("{root}/etc/hostname"))?.trim(), "mail-0");
    let resolv = std::fs::read_to_string(format!("{root}/etc/resolv.conf"))?;
    for line in ["search mail.svc.test svc.test", &format!("nameserver {address}"), "options ndots:5"] {
        assert!(resolv.lines().any(|found| found == line), "no {line:?} in {resolv}");
    }
    // It shares the name, the network and the shared memory with the pod's other containers, and the processes not.
    let sidecar = pod.container("sidecar").args(["report"]).start().await?;
    assert_eq!(sidecar.ended(SOON).await?.exit_code, 0);
    let report: Value = serde_json::from_str(&sidecar.log()?.first().context("a report")?.text)?;
    assert_eq!(report["hostname"], "mail-0");
    let sidecar = pod.container("sidecar").args(["wait"]).start().await?;
    let (one, other) = (container.pid().await?, sidecar.pid().await?);
    for (namespace, shared) in [("uts", true), ("net", true), ("ipc", true), ("pid", false), ("mnt", false)] {
        let link = |pid: u32| std::fs::read_link(format!("/proc/{pid}/ns/{namespace}"));
        assert_eq!(link(one)? == link(other)?, shared, "{namespace}");
    }
    site.finish().await
}
