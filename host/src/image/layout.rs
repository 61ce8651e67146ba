//! An image on disk as the OCI's image layout has it: blobs named by their digest, and an index that leads to them.

use crate::component::digest;
use anyhow::{Context, Result, bail, ensure};
use flate2::Compression;
use flate2::write::GzEncoder;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;
use tar::{EntryType, Header};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const LAYER_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// The time that an image says it was made at.
#[derive(Debug, Clone)]
pub struct Created {
    seconds: u64,
    text: String,
}

impl Created {
    /// That many seconds after 1970 began.
    ///
    /// # Errors
    /// A time after the year 9999.
    pub fn at(seconds: u64) -> Result<Self> {
        let time = OffsetDateTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds).try_into()?);
        let text = time.context("a time after the year 9999")?.format(&Rfc3339)?;
        Ok(Self { seconds, text })
    }

    /// As RFC 3339 has it, in UTC.
    pub fn text(&self) -> &str {
        &self.text
    }
}

/// What an image is called, `REGISTRY/PATH:TAG`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Name {
    /// All of it.
    pub full: String,
    /// What comes after the colon.
    pub tag: String,
}

impl FromStr for Name {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let whole = text.rsplit_once(':').filter(|(_, tag)| !tag.contains('/')).and_then(|(repository, tag)| {
            let (registry, path) = repository.split_once('/')?;
            Some((registry, path, tag))
        });
        let is_registry = |name: &str| name.contains(['.', ':']) || name == "localhost";
        let Some((registry, path, tag)) = whole.filter(|(registry, ..)| is_registry(registry)) else {
            return Err("needs a registry and a tag, as in registry.example.com/team/triage:1.0".into());
        };
        let (host, port) = registry.split_once(':').unwrap_or((registry, "443"));
        let host_is_good = !host.is_empty() && host.bytes().all(|c| c.is_ascii_alphanumeric() || b"-.".contains(&c));
        if !host_is_good || port.parse::<u16>().is_err() {
            return Err(format!("{registry} is no registry"));
        }
        let is_part = |part: &str| {
            let inside = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
            let bytes = part.as_bytes();
            bytes.first().copied().is_some_and(inside)
                && bytes.last().copied().is_some_and(inside)
                && bytes.iter().all(|&c| inside(c) || b"-._".contains(&c))
        };
        if !path.split('/').all(is_part) {
            return Err(format!("{path} is no path: small letters, digits, and between them - . _"));
        }
        let word = |c: u8| c.is_ascii_alphanumeric() || c == b'_';
        let tag_is_good = tag.bytes().next().is_some_and(word) && tag.bytes().all(|c| word(c) || b"-.".contains(&c));
        if !tag_is_good || tag.len() > 128 {
            return Err(format!("{tag:?} is no tag: letters, digits, and behind the first also - . _, 128 at most"));
        }
        Ok(Self { full: text.to_owned(), tag: tag.to_owned() })
    }
}

/// A file of a container's root.
pub struct File {
    /// From the root, without a slash in front.
    pub path: String,
    /// The permissions, such as `0o755`.
    pub mode: u32,
    /// What is in it.
    pub bytes: Vec<u8>,
}

/// Bytes that a manifest refers to.
pub struct Blob {
    media_type: &'static str,
    bytes: Vec<u8>,
    annotations: BTreeMap<String, String>,
}

impl Blob {
    /// `bytes`, which are of that media type.
    pub fn new(media_type: &'static str, bytes: Vec<u8>) -> Self {
        Self { media_type, bytes, annotations: BTreeMap::new() }
    }

    /// `value` as JSON, its members in the order of their declaration.
    ///
    /// # Errors
    /// A value that JSON cannot hold.
    pub fn json(media_type: &'static str, value: &impl Serialize) -> Result<Self> {
        Ok(Self::new(media_type, serde_json::to_vec(value).context("write JSON")?))
    }

    /// Adds what the manifest says about it.
    pub fn annotated(mut self, key: &str, value: &str) -> Self {
        self.annotations.insert(key.to_owned(), value.to_owned());
        self
    }

    /// The SHA-256 of its bytes, as `sha256:…`.
    pub fn digest(&self) -> String {
        digest(&self.bytes)
    }

    fn descriptor(&self) -> Descriptor<'_> {
        Descriptor {
            media_type: self.media_type,
            digest: self.digest(),
            size: self.bytes.len(),
            annotations: &self.annotations,
        }
    }

    fn path(&self) -> String {
        self.digest().replacen("sha256:", "blobs/sha256/", 1)
    }
}

/// Files as a layer of an image, and the digest of the layer when it is not compressed.
///
/// # Errors
/// A path too long for a tar archive.
pub fn layer(files: &[File], created: &Created, gzip: bool) -> Result<(Blob, String)> {
    let archive = archive(files, created)?;
    let diff_id = digest(&archive);
    if !gzip {
        return Ok((Blob::new(LAYER, archive), diff_id));
    }
    // The header of the stream holds neither a time nor a name.
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(&archive).context("compress a layer")?;
    Ok((Blob::new(LAYER_GZIP, encoder.finish().context("compress a layer")?), diff_id))
}

/// A tar archive of `files` and of the folders they are in, all of them root's, all of the same time.
fn archive(files: &[File], created: &Created) -> Result<Vec<u8>> {
    let mut archive = tar::Builder::new(Vec::new());
    let mut folders = Vec::new();
    let mut append = |kind: EntryType, path: &str, mode: u32, bytes: &[u8]| {
        let mut header = Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(created.seconds);
        header.set_size(bytes.len() as u64);
        archive.append_data(&mut header, path, bytes).with_context(|| format!("archive {path}"))
    };
    for File { path, mode, bytes } in files {
        for (end, _) in path.match_indices('/') {
            let folder = &path[..=end];
            if !folders.contains(&folder) {
                append(EntryType::Directory, folder, 0o755, b"")?;
                folders.push(folder);
            }
        }
        append(EntryType::Regular, path, *mode, bytes)?;
    }
    archive.into_inner().context("archive files")
}

/// What a registry keeps under a name: a configuration and layers.
pub struct Manifest {
    /// What its media type says.
    pub config: Blob,
    /// From the lowest to the topmost.
    pub layers: Vec<Blob>,
    /// What is said about all of it.
    pub annotations: BTreeMap<String, String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor<'a> {
    media_type: &'static str,
    digest: String,
    size: usize,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    annotations: &'a BTreeMap<String, String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ManifestJson<'a> {
    schema_version: u8,
    media_type: &'static str,
    config: Descriptor<'a>,
    layers: Vec<Descriptor<'a>>,
    annotations: &'a BTreeMap<String, String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct IndexJson<'a> {
    schema_version: u8,
    media_type: &'static str,
    manifests: [Descriptor<'a>; 1],
}

/// How `docker save` lists an image; older tools read this and not the index.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct DockerJson<'a> {
    config: String,
    repo_tags: [&'a str; 1],
    layers: Vec<String>,
}

/// The files of an image layout.
pub struct Layout {
    files: Vec<File>,
    /// The SHA-256 of the manifest, by which registries and nodes know the image.
    pub digest: String,
}

impl Layout {
    /// Lays out `manifest` under `name`.
    ///
    /// # Errors
    /// A value that JSON cannot hold.
    pub fn new(manifest: Manifest, name: &Name) -> Result<Self> {
        let Manifest { config, layers, annotations } = manifest;
        // Neither the index nor the blob says which platform this is for: containerd looks into the configuration then.
        let blob = Blob::json(
            MANIFEST,
            &ManifestJson {
                schema_version: 2,
                media_type: MANIFEST,
                config: config.descriptor(),
                layers: layers.iter().map(Blob::descriptor).collect(),
                annotations: &annotations,
            },
        )?
        .annotated("io.containerd.image.name", &name.full)
        .annotated("org.opencontainers.image.ref.name", &name.tag);
        let index = IndexJson { schema_version: 2, media_type: INDEX, manifests: [blob.descriptor()] };
        let docker = DockerJson {
            config: config.path(),
            repo_tags: [&name.full],
            layers: layers.iter().map(Blob::path).collect(),
        };
        let file = |path: &str, bytes| File { path: path.into(), mode: 0o644, bytes };
        let mut files = vec![
            file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()),
            file("index.json", serde_json::to_vec(&index).context("write JSON")?),
        ];
        // An artifact is nothing that `docker load` could take.
        if layers.iter().all(|layer| [LAYER, LAYER_GZIP].contains(&layer.media_type)) {
            files.push(file("manifest.json", serde_json::to_vec(&[docker]).context("write JSON")?));
        }
        let digest = blob.digest();
        let blobs = [blob, config].into_iter().chain(layers);
        files.extend(blobs.map(|blob| file(&blob.path(), blob.bytes)));
        Ok(Self { files, digest })
    }

    /// All of it as one tar archive.
    ///
    /// # Errors
    /// None that is known.
    pub fn to_tar(&self, created: &Created) -> Result<Vec<u8>> {
        archive(&self.files, created)
    }

    /// Writes it as a folder, whole or not at all, and returns how many bytes that are.
    ///
    /// # Errors
    /// A folder that exists and is not empty, or that cannot be written.
    pub fn write_folder(&self, folder: &Path) -> Result<usize> {
        if let Ok(mut entries) = folder.read_dir() {
            ensure!(entries.next().is_none(), "is not empty");
        } else if folder.exists() {
            bail!("is no folder");
        }
        let parent = folder.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let made = tempfile::tempdir_in(parent)?;
        for File { path, bytes, .. } in &self.files {
            let path = made.path().join(path);
            path.parent().map_or(Ok(()), fs::create_dir_all)?;
            fs::write(path, bytes)?;
        }
        fs::set_permissions(made.path(), fs::Permissions::from_mode(0o755))?;
        fs::rename(made.path(), folder)?;
        // It has another name now.
        let _ = made.keep();
        Ok(self.files.iter().map(|file| file.bytes.len()).sum())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_a_registry_a_path_and_a_tag() {
        for (text, tag) in [
            ("registry.example.com/team/triage:1.0", "1.0"),
            ("localhost/triage:latest", "latest"),
            ("localhost:5000/triage:_x", "_x"),
            ("mailroom.local/a-b/c_d.e__f:A-1", "A-1"),
        ] {
            let name: Name = text.parse().expect(text);
            assert_eq!((&*name.full, &*name.tag), (text, tag));
        }
        for text in [
            "",
            "triage",
            "triage:1.0",
            "team/triage:1.0",
            "registry.example.com/triage",
            "registry.example.com:443/triage",
            "registry.example.com/:1",
            "registry.example.com/team//triage:1",
            "registry.example.com/Team/triage:1",
            "registry.example.com/-triage:1",
            "registry.example.com/triage:",
            "registry.example.com/triage:.1",
            "registry.example.com/triage:1 0",
            "registry.example.com:x/triage:1",
            ":1/triage:1",
            "registry.example.com/triage@sha256:12",
        ] {
            text.parse::<Name>().expect_err(text);
        }
        let long = format!("localhost/triage:{}", "1".repeat(129));
        long.parse::<Name>().expect_err("a tag of 129 letters");
    }

    #[test]
    fn times_are_of_this_calendar() {
        assert_eq!(Created::at(0).expect("1970").text(), "1970-01-01T00:00:00Z");
        assert_eq!(Created::at(1_700_000_000).expect("2023").text(), "2023-11-14T22:13:20Z");
        Created::at(u64::MAX).expect_err("far too late");
        Created::at(253_402_300_800).expect_err("the year 10000");
    }

    #[test]
    fn layers_are_the_same_for_the_same_files() {
        let files = || {
            ["triage.wasm", "etc/ssl/certs/ca-certificates.crt"].map(|path| File {
                path: path.into(),
                mode: 0o644,
                bytes: path.repeat(1000).into_bytes(),
            })
        };
        let created = Created::at(5).expect("a time");
        let (plain, plain_id) = layer(&files(), &created, false).expect("a layer");
        let (gzip, gzip_id) = layer(&files(), &created, true).expect("a layer");
        assert_eq!((&plain.digest(), &plain_id), (&plain_id, &gzip_id));
        assert!(gzip.bytes.len() < plain.bytes.len() / 10, "{} bytes", gzip.bytes.len());
        assert_eq!(layer(&files(), &created, true).expect("a layer").0.bytes, gzip.bytes);

        let mut archive = tar::Archive::new(&*plain.bytes);
        let entries: Vec<_> = archive
            .entries()
            .expect("an archive")
            .map(|entry| {
                let entry = entry.expect("an entry");
                let header = entry.header();
                let path = entry.path().expect("a path").display().to_string();
                let owner = (header.uid().expect("a user"), header.gid().expect("a group"));
                (path, header.mode().expect("a mode"), header.mtime().expect("a time"), owner)
            })
            .collect();
        let expected = [
            ("triage.wasm", 0o644),
            ("etc/", 0o755),
            ("etc/ssl/", 0o755),
            ("etc/ssl/certs/", 0o755),
            ("etc/ssl/certs/ca-certificates.crt", 0o644),
        ];
        assert_eq!(entries, expected.map(|(path, mode)| (path.to_owned(), mode, 5, (0, 0))));
    }
}
