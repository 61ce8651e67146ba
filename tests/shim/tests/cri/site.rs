//! What most tests stand on: a node, and a provisioned server that its pods reach.

use shim_tests::ContainerBuilder;
use shim_tests::prelude::*;
use std::path::PathBuf;

/// A node with the images `triage` and `actor`, each no more than a component, and its nats-server.
pub struct Site {
    pub node: Node,
    pub bed: Bed,
}

impl Site {
    pub async fn new() -> Result<Self> {
        Self::with(Settings::default(), &[]).await
    }

    /// With a server of its own kind and more arguments for `host provision`.
    pub async fn with(settings: Settings, args: &[&str]) -> Result<Self> {
        Self::on(node().await?, settings, args).await
    }

    /// On a node that has the images.
    pub async fn on(node: Node, settings: Settings, args: &[&str]) -> Result<Self> {
        let bed = Bed::on(node.nats(settings).await?, args).await?;
        Ok(Self { node, bed })
    }

    /// Prepares a container of a component image that takes its mail from the server.
    pub fn host<'a>(&self, pod: &'a Pod<'a>, image: &str) -> ContainerBuilder<'a> {
        pod.container(image).env("MAILROOM_SERVER", self.bed.server.url()).env("MAILROOM_LISTEN", "0.0.0.0:9464")
    }

    /// Removes what pods are left and shows that nothing remains of any.
    pub async fn finish(self) -> Result<()> {
        self.node.finish().await
    }
}

/// A node with the images `triage` and `actor`, for tests without a server.
pub async fn node() -> Result<Node> {
    with_images(Node::start().await?).await
}

/// Gives a node the images `triage` and `actor`.
pub async fn with_images(node: Node) -> Result<Node> {
    for component in ["triage", "actor"] {
        make_image(&node, component, component, &[]).await?;
    }
    Ok(node)
}

/// Has `host image` make the image `mailroom.local/NAME:1` of a component, and gives it to the node; returns its file.
pub async fn make_image(node: &Node, component: &str, name: &str, args: &[&str]) -> Result<PathBuf> {
    let tar = node.folder().join(format!("{name}.tar"));
    let (component, output) = (tools::component(component)?, tar.to_string_lossy());
    let name = format!("mailroom.local/{name}:1");
    let fixed = ["image", &component.to_string_lossy(), "--name", &name, "--output", &output];
    command::host(fixed.iter().chain(args)).await?.success()?;
    node.import_archive(&tar).await?;
    node.until_image(&name).await?;
    Ok(tar)
}

/// Waits until the host in a container fetches messages.
pub async fn running(container: &Container<'_>) -> Result<()> {
    container.wait_for_line(SOON, |line| line.contains("\"running\"")).await.map(drop)
}
