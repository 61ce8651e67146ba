//! Images of the tests' own, written as OCI layouts: no registry, no builder.

use anyhow::{Context as _, Result};
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::io::Write as _;
use tar::{Builder, Header};

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const LAYER_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// An image `FROM scratch`: a few files and an entrypoint.
#[derive(Clone, Debug)]
pub struct Image {
    name: String,
    files: Vec<(String, Vec<u8>)>,
    entrypoint: Vec<String>,
    environment: Vec<String>,
    compressed: bool,
}

impl Image {
    /// An image without files that is called `mailroom.local/NAME:1`, whose entrypoint is `entrypoint`.
    pub fn scratch(name: &str, entrypoint: &[&str]) -> Self {
        Self {
            name: format!("mailroom.local/{name}:1"),
            files: Vec::new(),
            entrypoint: entrypoint.iter().map(|&word| word.to_owned()).collect(),
            environment: Vec::new(),
            compressed: false,
        }
    }

    /// Calls it otherwise.
    #[must_use]
    pub fn named(self, name: &str) -> Self {
        Self { name: name.to_owned(), ..self }
    }

    /// Adds an executable file.
    #[must_use]
    pub fn file(mut self, path: &str, content: impl Into<Vec<u8>>) -> Self {
        self.files.push((path.trim_start_matches('/').to_owned(), content.into()));
        self
    }

    /// Adds a variable to the environment of its containers.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push(format!("{name}={value}"));
        self
    }

    /// Compresses it, as images in registries are.
    #[must_use]
    pub fn compressed(self) -> Self {
        Self { compressed: true, ..self }
    }

    /// What containers name it by.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn layer(&self) -> Result<Vec<u8>> {
        let mut layer = Builder::new(Vec::new());
        for (path, content) in &self.files {
            append(&mut layer, path, content, 0o755)?;
        }
        layer.into_inner().context("write a layer")
    }
}

/// The images as one OCI layout in a tar, as `ctr image import` takes it.
///
/// # Errors
/// When a path does not fit into a tar.
pub fn archive(images: &[Image]) -> Result<Vec<u8>> {
    let mut blobs = BTreeMap::new();
    let mut manifests = Vec::new();
    for image in images {
        let layer = image.layer()?;
        let diff_id = digest(&layer);
        let layer = if image.compressed {
            let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
            encoder.write_all(&layer).context("compress a layer")?;
            add(&mut blobs, LAYER_GZIP, encoder.finish().context("compress a layer")?)
        } else {
            add(&mut blobs, LAYER, layer)
        };
        let config = json!({
            "architecture": architecture(),
            "os": "linux",
            "config": { "Entrypoint": image.entrypoint, "Env": image.environment },
            "rootfs": { "type": "layers", "diff_ids": [diff_id] },
        });
        let config = add(&mut blobs, CONFIG, config.to_string().into_bytes());
        let manifest = json!({ "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [layer] });
        let mut manifest = add(&mut blobs, MANIFEST, manifest.to_string().into_bytes());
        manifest["annotations"] = json!({ "io.containerd.image.name": image.name });
        manifests.push(manifest);
    }
    let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": manifests });
    let mut layout = Builder::new(Vec::new());
    append(&mut layout, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#, 0o644)?;
    append(&mut layout, "index.json", index.to_string().as_bytes(), 0o644)?;
    for (digest, blob) in &blobs {
        append(&mut layout, &format!("blobs/{}", digest.replace(':', "/")), blob, 0o644)?;
    }
    layout.into_inner().context("write an OCI layout")
}

/// Keeps a blob and returns its descriptor.
fn add(blobs: &mut BTreeMap<String, Vec<u8>>, media_type: &str, blob: Vec<u8>) -> Value {
    let digest = digest(&blob);
    let descriptor = json!({ "mediaType": media_type, "digest": digest, "size": blob.len() });
    blobs.insert(digest, blob);
    descriptor
}

fn digest(blob: &[u8]) -> String {
    format!("sha256:{:x}", Sha256::digest(blob))
}

fn append(archive: &mut Builder<Vec<u8>>, path: &str, content: &[u8], mode: u32) -> Result<()> {
    let mut header = Header::new_ustar();
    header.set_size(content.len() as u64);
    header.set_mode(mode);
    archive.append_data(&mut header, path, content).with_context(|| format!("add {path} to an archive"))
}

/// This machine's architecture, as images name it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
