//! What cannot run fails with a message that says what to do, in the container's status or its log, and leaves nothing.

use crate::site::{Site, running};
use k8s_cri::v1::ContainerState;
use shim_tests::ContainerBuilder;
use shim_tests::prelude::*;

/// An image `NAME`, whose entrypoint is `/NAME.wasm`, with `component` as that file.
fn image(name: &str, component: impl Into<Vec<u8>>) -> Image {
    let file = format!("/{name}.wasm");
    Image::scratch(name, &[&file]).file(&file, component)
}

/// Starts the container and expects the start to fail: the error that a kubelet shows as the container's state.
async fn start_refused(container: ContainerBuilder<'_>, words: &[&str]) -> Result<()> {
    let container = container.create().await?;
    let error = container.start().await.err().context("it starts")?;
    let status = container.status().await?;
    ensure!(status.state() == ContainerState::ContainerExited && status.reason == "StartError", "{status:?}");
    for said in [error.message(), &status.message] {
        for word in words {
            ensure!(said.contains(word), "no {word:?} in {said}");
        }
    }
    container.remove().await
}

/// Starts the container and expects it to end by itself, with the error in its log and as its termination message.
async fn ends_refused(container: ContainerBuilder<'_>, words: &[&str]) -> Result<()> {
    let container = container.start().await?;
    let status = container.ended(SOON).await?;
    ensure!((status.exit_code, status.reason.as_str()) == (1, "Error"), "{status:?}: {:?}", container.log()?);
    let log = container.log()?;
    let error = log.iter().find(|line| words.iter().all(|word| line.text.contains(word)));
    ensure!(error.is_some(), "no line with {words:?}: {log:?}");
    let message = container.termination_message()?;
    for word in words {
        ensure!(message.contains(word), "no {word:?} in the termination message {message:?}");
    }
    container.remove().await
}

/// An entrypoint that names no file, one that is no component, and one that was cut short.
#[tokio::test]
async fn what_is_no_component_does_not_start() -> Result<()> {
    let site = Site::new().await?;
    let whole = std::fs::read(tools::component("triage")?)?;
    let cut = whole[..whole.len() / 2].to_vec();
    let module = wat::parse_str("(module)")?;
    let missing = Image::scratch("missing", &["/missing.wasm"]).file("/other.wasm", whole);
    let images = [missing, image("text", "(component)"), image("cut", cut), image("module", module)];
    site.node.import(&images).await?;
    let pod = site.node.pod().run().await?;
    start_refused(site.host(&pod, "missing"), &["/missing.wasm", "no such component in the image"]).await?;
    start_refused(site.host(&pod, "text"), &["/text.wasm", "it takes a .wasm component"]).await?;
    start_refused(site.host(&pod, "cut"), &["/cut.wasm", "no valid component"]).await?;
    start_refused(site.host(&pod, "module"), &["/module.wasm", "core module", "host compile"]).await?;
    // The pod is none the worse for it.
    running(&site.host(&pod, "triage").start().await?).await?;
    pod.remove().await?;
    site.node.nothing_left().await?;
    site.finish().await
}

/// A component that is made for another host, and one that wants what nothing grants.
#[tokio::test]
async fn a_component_for_another_world_is_refused() -> Result<()> {
    let site = Site::new().await?;
    let sockets = wat::parse_str(
        r#"(component
            (import "wasi:sockets/tcp@0.2.6" (instance))
            (instance $handler)
            (export "mailroom:triage/handler@0.1.0" (instance $handler)))"#,
    )?;
    let http = std::fs::read(tools::component("triage-http")?)?;
    site.node.import(&[image("sockets", sockets), image("http", http)]).await?;
    let pod = site.node.pod().run().await?;
    ends_refused(site.host(&pod, "sockets"), &["imports wasi:sockets/tcp@0.2.6", "a guest gets no network"]).await?;
    ends_refused(site.host(&pod, "http"), &["mailroom:triage/handler@0.1.0", "wasi:http/incoming-handler"]).await?;
    pod.remove().await?;
    site.node.nothing_left().await?;
    site.finish().await
}

/// Wrong credentials and wrong flags are told apart from a server that is away.
#[tokio::test]
async fn what_is_configured_wrongly_ends_with_the_reason() -> Result<()> {
    let node = crate::site::node().await?;
    let extra = "authorization { users [ { user: mail, password: right } ] }\n".to_owned();
    let server = node.nats(Settings { extra, ..Settings::default() }).await?;
    let pod = node.pod().run().await?;
    let login = ["--server", server.url(), "--user", "mail", "--password", "wrong"];
    ends_refused(pod.container("triage").args(login), &["the server refuses user mail", "--password-file"]).await?;
    let container = pod.container("triage").args(["--shards", "none"]).start().await?;
    assert_eq!(container.ended(SOON).await?.exit_code, 2);
    assert!(container.log()?.iter().any(|line| line.text.contains("--shards")), "{:?}", container.log()?);
    node.finish().await
}
