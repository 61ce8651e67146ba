//! Images as `host image` makes them.

use crate::site::{make_image, running};
use shim_tests::prelude::*;
use std::fs;
use tests::ImageLayout;

/// Most bytes that the image of the host may have; it is a program with a library for WebAssembly in it.
const HOST_IMAGE_MAX_BYTES: usize = 8 << 20;

/// Makes an image `mailroom.local/made:1` of the triage and gives it to the node; returns what is in it.
async fn made(node: &Node, args: &[&str]) -> Result<(usize, ImageLayout)> {
    let tar = make_image(node, "triage", "made", args).await?;
    let tar = fs::read(tar)?;
    Ok((tar.len(), ImageLayout::of_tar(&tar)?))
}

/// Runs a pod of the image under the handler until it has given a verdict, and stops it.
async fn gives_a_verdict(node: &Node, handler: &str) -> Result<()> {
    let bed = Bed::on(node.nats(Settings::default()).await?, &[]).await?;
    let pod = node.pod_of(handler).run().await?;
    // The image's own arguments say where to listen.
    let container = pod.container("made").env("MAILROOM_SERVER", bed.server.url()).start().await?;
    running(&container).await?;
    let admin = format!("http://{}:9000", pod.address().await?);
    let ready = async || http::get(&format!("{admin}/readyz")).await;
    eventually(SOON, "the host is ready", ready, |answer| answer.status == 200).await?;
    let mail = fs::read(tools::mails()?.first().context("a mail")?)?;
    bed.jetstream.publish("mail.test", mail.into()).await?.await?;
    bed.verdicts(1).await?;
    let ids = ["Uid", "Gid"].map(async |id| container.proc_status(id).await);
    for id in ids {
        assert_eq!(id.await?, "65532\t65532\t65532\t65532");
    }
    assert_eq!(container.stop(SOON).await?.exit_code, 0);
    pod.remove().await
}

const LISTEN: [&str; 2] = ["--arg=--listen", "--arg=0.0.0.0:9000"];

/// The image of a component alone runs on a node with the shim.
#[tokio::test]
async fn an_image_of_a_component_runs_with_the_shim() -> Result<()> {
    let node = Node::start().await?;
    made(&node, &LISTEN).await?;
    gives_a_verdict(&node, MAILROOM).await?;
    node.finish().await
}

/// The image of the host runs on every node: it is whole, small, and needs no compiler, no library and no shim.
#[tokio::test]
async fn an_image_of_the_host_runs_on_any_node() -> Result<()> {
    let node = Node::start().await?;
    let executable = tools::shim()?.join("mailroom-host");
    let executable = executable.to_string_lossy();
    let (bytes, layout) =
        made(&node, &[&LISTEN[..], &["--format", "host", "--executable", &executable]].concat()).await?;
    ensure!(bytes < HOST_IMAGE_MAX_BYTES, "{bytes} bytes");
    let process = layout.image()?.config().clone().context("a configuration of the process")?;
    assert_eq!(process.entrypoint().clone().unwrap_or_default(), ["/host", "run", "--component", "/triage.cwasm"]);
    let files = layout.files()?;
    let kinds: Vec<_> = files.iter().map(|file| (file.path.as_str(), file.mode)).collect();
    assert_eq!(kinds, [("host", 0o755), ("triage.cwasm", 0o644)]);
    gives_a_verdict(&node, RUNC).await?;
    node.finish().await
}
