use anyhow::{Context as _, Result, bail, ensure};
use flate2::read::GzDecoder;
use oci_spec::image::{Descriptor, ImageConfiguration, ImageIndex, ImageManifest, MediaType, OciLayout};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::path::Path;
use tar::{Archive, EntryType};

/// An image as the OCI's layout has it, checked while it is read: every digest and size is right, every blob is
/// referred to, and JSON holds nothing that the specification does not know.
#[derive(Debug)]
pub struct ImageLayout {
    /// What the index says of the image.
    pub annotations: BTreeMap<String, String>,
    /// The digest by which registries and nodes know it.
    pub digest: String,
    /// The image, or artifact.
    pub manifest: ImageManifest,
    /// Its configuration, whatever the type.
    pub config: Value,
    /// Its layers as they are stored.
    pub layers: Vec<Vec<u8>>,
}

/// A file or folder of a layer.
#[derive(Debug, PartialEq, Eq)]
pub struct LayerEntry {
    /// From the root; a folder's ends in a slash.
    pub path: String,
    /// Its permissions.
    pub mode: u32,
    /// Its user and group.
    pub owner: (u64, u64),
    /// When it was changed, in seconds since 1970.
    pub modified: u64,
    /// What is in it.
    pub bytes: Vec<u8>,
}

impl ImageLayout {
    /// Reads a layout in a tar.
    ///
    /// # Errors
    /// Whatever is wrong with it.
    pub fn of_tar(tar: &[u8]) -> Result<Self> {
        let entries = entries(tar)?.into_iter().filter(|entry| !entry.path.ends_with('/'));
        Self::of_files(entries.map(|entry| (entry.path, entry.bytes)).collect())
    }

    /// Reads a layout in a folder.
    ///
    /// # Errors
    /// Whatever is wrong with it.
    pub fn of_folder(folder: &Path) -> Result<Self> {
        let mut files = BTreeMap::new();
        for part in ["", "blobs/sha256/"] {
            for entry in folder.join(part).read_dir().with_context(|| format!("read {}", folder.display()))? {
                let entry = entry?;
                if entry.path().is_file() {
                    files.insert(format!("{part}{}", entry.file_name().display()), fs::read(entry.path())?);
                }
            }
        }
        Self::of_files(files)
    }

    fn of_files(mut files: BTreeMap<String, Vec<u8>>) -> Result<Self> {
        let layout: OciLayout = json(&take(&mut files, "oci-layout")?)?;
        ensure!(layout.image_layout_version() == "1.0.0", "{layout:?}");
        let index: ImageIndex = json(&take(&mut files, "index.json")?)?;
        let docker = files.remove("manifest.json");
        let [image] = &index.manifests()[..] else { bail!("not one image: {index:?}") };
        ensure!(*image.media_type() == MediaType::ImageManifest, "{image:?}");
        let manifest: ImageManifest = json(&blob(&mut files, image)?)?;
        let config = serde_json::from_slice(&blob(&mut files, manifest.config())?)?;
        let layers: Vec<_> = manifest.layers().iter().map(|layer| blob(&mut files, layer)).collect::<Result<_>>()?;
        ensure!(files.is_empty(), "nothing refers to {:?}", files.keys());
        ensure!((index.schema_version(), manifest.schema_version()) == (2, 2), "other versions than 2");

        let annotations: BTreeMap<_, _> = image.annotations().clone().unwrap_or_default().into_iter().collect();
        if let Some(docker) = docker {
            let path = |blob: &Descriptor| blob.digest().to_string().replace(':', "/");
            let path = |blob: &Descriptor| format!("blobs/{}", path(blob));
            let expected = serde_json::json!([{
                "Config": path(manifest.config()),
                "RepoTags": [annotations.get("io.containerd.image.name")],
                "Layers": manifest.layers().iter().map(path).collect::<Vec<_>>(),
            }]);
            ensure!(serde_json::from_slice::<Value>(&docker)? == expected, "manifest.json is not {expected}");
        }
        Ok(Self { annotations, digest: image.digest().to_string(), manifest, config, layers })
    }

    /// The configuration of a container image.
    ///
    /// # Errors
    /// Where it is none, or says something else than its layers.
    pub fn image(&self) -> Result<ImageConfiguration> {
        ensure!(*self.manifest.config().media_type() == MediaType::ImageConfig, "{:?}", self.manifest);
        let config: ImageConfiguration = json(self.config.to_string().as_bytes())?;
        let layers = self.manifest.layers().iter().zip(&self.layers);
        let digests: Vec<_> = layers.map(|layer| Ok(digest(&uncompressed(layer)?))).collect::<Result<_>>()?;
        ensure!(*config.rootfs().diff_ids() == digests, "{:?} are not the layers: {digests:?}", config.rootfs());
        Ok(config)
    }

    /// The files of an image of one layer, in their order.
    ///
    /// # Errors
    /// Where there is another number of layers, or it is no tar.
    pub fn files(&self) -> Result<Vec<LayerEntry>> {
        let [layer] = self.manifest.layers().iter().zip(&self.layers).collect::<Vec<_>>()[..] else {
            bail!("not one layer: {:?}", self.manifest)
        };
        entries(&uncompressed(layer)?)
    }
}

fn uncompressed((layer, bytes): (&Descriptor, &Vec<u8>)) -> Result<Vec<u8>> {
    match layer.media_type() {
        MediaType::ImageLayer => Ok(bytes.clone()),
        MediaType::ImageLayerGzip => {
            let mut plain = Vec::new();
            GzDecoder::new(&bytes[..]).read_to_end(&mut plain).context("unpack a layer")?;
            Ok(plain)
        }
        other => bail!("{other} is no layer of an image"),
    }
}

fn entries(tar: &[u8]) -> Result<Vec<LayerEntry>> {
    let mut archive = Archive::new(tar);
    let mut entries = Vec::new();
    for entry in archive.entries().context("read a tar")? {
        let mut entry = entry.context("read a tar")?;
        let header = entry.header();
        ensure!([EntryType::Regular, EntryType::Directory].contains(&header.entry_type()), "{header:?}");
        let (mode, owner, modified) = (header.mode()?, (header.uid()?, header.gid()?), header.mtime()?);
        let path = entry.path()?.display().to_string();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes)?;
        entries.push(LayerEntry { path, mode, owner, modified, bytes });
    }
    Ok(entries)
}

/// Takes the blob out of `files` that `descriptor` means, if it is that one.
fn blob(files: &mut BTreeMap<String, Vec<u8>>, descriptor: &Descriptor) -> Result<Vec<u8>> {
    let named = descriptor.digest().to_string();
    let bytes = take(files, &format!("blobs/{}", named.replace(':', "/")))?;
    ensure!(digest(&bytes) == named, "{named} is in fact {}", digest(&bytes));
    ensure!(bytes.len() as u64 == descriptor.size(), "{named} has {} bytes, not {}", bytes.len(), descriptor.size());
    Ok(bytes)
}

fn take(files: &mut BTreeMap<String, Vec<u8>>, path: &str) -> Result<Vec<u8>> {
    files.remove(path).with_context(|| format!("no {path}"))
}

fn digest(bytes: &[u8]) -> String {
    format!("sha256:{:x}", Sha256::digest(bytes))
}

/// Reads JSON that `T` is all of.
fn json<T: DeserializeOwned + Serialize>(bytes: &[u8]) -> Result<T> {
    let value: Value = serde_json::from_slice(bytes).context("no JSON")?;
    let read: T = serde_json::from_value(value.clone()).with_context(|| value.to_string())?;
    let known = serde_json::to_value(&read)?;
    ensure!(known == value, "the specification knows only {known} of {value}");
    Ok(read)
}
