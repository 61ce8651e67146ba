//! Machine code: made once a node, kept where only root writes, and taken from an image only if the operator says so.

use crate::site::{Site, running, with_images};
use k8s_cri::v1::ContainerState;
use shim_tests::cgroup::Limits;
use shim_tests::prelude::*;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// All that is in a folder and below it, folders and files.
fn contents(folder: &Path) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
    let (mut folders, mut files) = (vec![folder.to_owned()], Vec::new());
    let mut next = 0;
    while let Some(folder) = folders.get(next).cloned() {
        next += 1;
        for entry in fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))? {
            let path = entry?.path();
            if path.is_dir() { folders.push(path) } else { files.push(path) }
        }
    }
    Ok((folders, files))
}

/// A component is compiled for the first of its pods and taken from the cache by the others, whatever their image is
/// called; another component has machine code of its own.
#[tokio::test]
async fn a_component_is_compiled_once_a_node() -> Result<()> {
    let site = Site::new().await?;
    let same = Image::scratch("renamed", &["/other.wasm"]).file("/other.wasm", fs::read(tools::component("triage")?)?);
    site.node.import(&[same]).await?;
    let mut inode = None;
    for image in ["triage", "triage", "renamed"] {
        let pod = site.node.pod().run().await?;
        running(&site.host(&pod, image).start().await?).await?;
        let (folders, files) = contents(&site.node.cache())?;
        for path in folders.iter().chain(&files) {
            let metadata = fs::metadata(path)?;
            assert_eq!(
                (metadata.uid(), metadata.mode() & 0o022),
                (0, 0),
                "{} is root's alone to write",
                path.display()
            );
        }
        let [file] = &files[..] else { bail!("one component, one file: {files:?}") };
        assert!(file.extension().is_some_and(|extension| extension == "cwasm"), "{}", file.display());
        let found = fs::metadata(file)?.ino();
        assert_eq!(*inode.get_or_insert(found), found, "{image}: compiled again");
        pod.remove().await?;
    }
    let pod = site.node.pod().run().await?;
    running(&site.host(&pod, "actor").start().await?).await?;
    assert_eq!(contents(&site.node.cache())?.1.len(), 2);
    site.finish().await
}

/// Pods that start together wait for the one that compiles.
#[tokio::test]
async fn pods_that_start_together_compile_once() -> Result<()> {
    let site = Site::new().await?;
    let start = async || {
        let pod = site.node.pod().run().await?;
        running(&site.host(&pod, "actor").start().await?).await
    };
    futures::future::try_join_all((0..4).map(|_| start())).await?;
    let (_, files) = contents(&site.node.cache())?;
    assert_eq!(files.len(), 1, "{files:?}");
    site.finish().await
}

/// A stranger's component meets the compiler in a process that can compute and nothing else, at the cost of the pod.
#[tokio::test]
async fn the_compiler_is_confined() -> Result<()> {
    let site = Site::new().await?;
    let pod = site.node.pod().limits(Limits { memory: 512 << 20, millicores: 200 }).run().await?;
    let container = site.host(&pod, "actor").create().await?;
    let look = async || {
        let processes = site.node.processes();
        let is_compiler = |command: &str| command.contains("mailroom-compiler");
        let compiler = processes.iter().find(|process| is_compiler(&process.command)).context("no compiler")?.pid;
        let read = |file: &str| fs::read_to_string(format!("/proc/{compiler}/{file}"));
        let (status, own) = (read("status")?, |name: &str| fs::read_link(format!("/proc/{compiler}/{name}")));
        let has = |field: &str| status.lines().any(|line| line == field);
        let fields = ["Uid:\t65534\t65534\t65534\t65534", "Gid:\t65534\t65534\t65534\t65534", "NoNewPrivs:\t1"];
        ensure!(fields.into_iter().all(has) && has("CapEff:\t0000000000000000"), "{status}");
        ensure!(status.lines().any(|line| line.trim_end() == "Groups:"), "{status}");
        for namespace in ["ns/net", "ns/mnt", "ns/ipc"] {
            ensure!(own(namespace)? != fs::read_link(format!("/proc/self/{namespace}"))?, "{namespace}");
        }
        ensure!(fs::read_dir(format!("/proc/{compiler}/root"))?.count() == 0, "it has files");
        let cgroup = site.node.cgroup_of(compiler)?;
        ensure!(cgroup.starts_with(pod.cgroup()), "{cgroup}");
        Ok(())
    };
    let (started, seen) = tokio::join!(container.start(), eventually(SOON, "a confined compiler", look, |()| true));
    seen?;
    started?;
    running(&container).await?;
    site.finish().await
}

/// A component that is made to cost the compiler more memory than its pod has takes nobody else's.
#[tokio::test]
async fn compiling_counts_to_the_memory_of_the_pod() -> Result<()> {
    let site = Site::new().await?;
    let step = "(local.set 0 (i32.add (local.get 0) (i32.load (local.get 0))))";
    let bomb = format!("(component (core module (memory 1) (func (param i32) {})))", step.repeat(300_000));
    let image = Image::scratch("bomb", &["/bomb.wasm"]).file("/bomb.wasm", wat::parse_str(bomb)?);
    site.node.import(&[image]).await?;
    let pod = site.node.pod().limits(Limits { memory: 48 << 20, millicores: 0 }).run().await?;
    let sidecar = pod.container("sidecar").args(["wait"]).start().await?;
    let container = site.host(&pod, "bomb").create().await?;
    let error = container.start().await.err().context("it compiles in 48 MiB")?;
    assert!(error.message().contains("/bomb.wasm") && error.message().contains("memory"), "{error}");
    assert_eq!(sidecar.status().await?.state(), ContainerState::ContainerRunning);
    assert_eq!(contents(&site.node.cache())?.1, Vec::<PathBuf>::new());
    // The pod can go on with what fits.
    running(&site.host(&pod, "triage").start().await?).await?;
    pod.remove().await?;
    site.node.nothing_left().await?;
    site.finish().await
}

/// Machine code in an image could be anything: it is refused unless the operator trusts the images.
#[tokio::test]
async fn machine_code_in_an_image_needs_the_operators_word() -> Result<()> {
    let site = Site::new().await?;
    let file = site.node.folder().join("triage.cwasm");
    let component = tools::component("triage")?;
    let compile = ["compile", &component.to_string_lossy(), "--output", &file.to_string_lossy()].map(str::to_owned);
    command::host(&compile).await?.success()?;
    let image = Image::scratch("compiled", &["/triage.cwasm"]).file("/triage.cwasm", fs::read(&file)?);
    site.node.import(&[image]).await?;

    let pod = site.node.pod().run().await?;
    let container = site.host(&pod, "compiled").create().await?;
    let error = container.start().await.err().context("it starts")?;
    assert!(error.message().contains("/triage.cwasm") && error.message().contains("AllowCompiled"), "{error}");
    assert!(!site.node.cache().exists(), "there was nothing to compile");
    pod.remove().await?;

    let pod = site.node.pod_of("mailroom-compiled").run().await?;
    running(&site.host(&pod, "compiled").start().await?).await?;
    let mail = tools::mails()?.first().context("a mail")?.clone();
    site.bed.jetstream.publish("mail.test", fs::read(mail)?.into()).await?.await?;
    site.bed.verdicts(1).await?;
    pod.remove().await?;
    site.finish().await
}

/// crun in the place of runc, as `BinaryName` says.
#[tokio::test]
async fn crun_makes_the_containers_too() -> Result<()> {
    let site = Site::on(with_images(Node::start_for_crun().await?).await?, Settings::default(), &[]).await?;
    let pod = site.node.pod_of(MAILROOM_CRUN).run().await?;
    let container = site.host(&pod, "actor").start().await?;
    let sidecar = pod.container("sidecar").args(["wait"]).start().await?;
    running(&container).await?;
    assert_eq!(container.proc_status("CapBnd").await?, "0000000000000000");
    site.bed.tell(["verdict support"]).await?;
    site.bed.one_verdict_each(1).await?;
    assert_eq!(sidecar.exec(&["/sidecar", "exit", "3"]).await?.exit_code, 3);
    assert_eq!(container.stop(SOON).await?.exit_code, 0);
    pod.remove().await?;
    site.finish().await
}
