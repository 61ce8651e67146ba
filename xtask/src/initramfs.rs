//! The files that a Linux kernel starts with: an archive in cpio's format `newc`, uncompressed.

use crate::step::Result;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

const FOLDER: u32 = 0o040_755;
const FILE: u32 = 0o100_000;

/// What ends an archive.
const TRAILER: &str = "TRAILER!!!";

/// An archive that is being written. All that is in it belongs to root.
pub struct Initramfs<W: Write = BufWriter<File>> {
    archive: W,
    written: u32,
    present: BTreeSet<PathBuf>,
}

impl Initramfs {
    /// Begins a new one in `file`.
    pub fn create(file: &Path) -> Result<Self> {
        let archive = File::create(file).map_err(|err| format!("create {}: {err}", file.display()))?;
        Ok(Self::new(BufWriter::new(archive)))
    }
}

impl<W: Write> Initramfs<W> {
    fn new(archive: W) -> Self {
        Self { archive, written: 0, present: BTreeSet::new() }
    }

    /// Adds a folder with those above it. One that is there already stays.
    pub fn folder(&mut self, path: &Path) -> Result<()> {
        let path = path.strip_prefix("/").unwrap_or(path);
        if path == Path::new("") || self.present.contains(path) {
            return Ok(());
        }
        if let Some(parent) = path.parent() {
            self.folder(parent)?;
        }
        self.present.insert(path.to_owned());
        self.entry(&path.to_string_lossy(), FOLDER, &[])
    }

    /// Adds a file with the folders above it; `mode` are its permissions. The first file of a name stays.
    pub fn file(&mut self, path: &Path, mode: u32, content: &[u8]) -> Result<()> {
        let path = path.strip_prefix("/").unwrap_or(path);
        if let Some(parent) = path.parent() {
            self.folder(parent)?;
        }
        if !self.present.insert(path.to_owned()) {
            return Ok(());
        }
        self.entry(&path.to_string_lossy(), FILE | mode, content)
    }

    /// Ends the archive.
    pub fn finish(mut self) -> Result<()> {
        self.entry(TRAILER, 0, &[])?;
        self.archive.flush().map_err(|err| format!("write the initramfs: {err}"))
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<()> {
        let size = u32::try_from(content.len()).map_err(|_| format!("{name} has 4 GiB or more"))?;
        // With the zero that ends it.
        let name_size = u32::try_from(name.len() + 1).map_err(|_| format!("{name} is too long"))?;
        self.written += 1;
        // Magic number, inode, mode, user, group, links, time, size, device (2), device it is (2), size of the name,
        // checksum.
        let fields = [self.written, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        let mut header = String::from("070701");
        for field in fields {
            header += &format!("{field:08x}");
        }
        header += name;
        header.push('\0');
        let parts = [header.as_bytes(), padding(header.len()), content, padding(content.len())];
        parts
            .into_iter()
            .try_for_each(|part| self.archive.write_all(part))
            .map_err(|err| format!("write {name}: {err}"))
    }
}

/// Names and contents end at a multiple of four bytes.
fn padding(length: usize) -> &'static [u8] {
    &[0; 3][..length.next_multiple_of(4) - length]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_is_what_cpio_writes() {
        let mut initramfs = Initramfs::new(Vec::new());
        initramfs.file(Path::new("/a/b"), 0o755, b"hello").expect("a file");
        initramfs.file(Path::new("/a/b"), 0o644, b"other").expect("the same again");
        initramfs.folder(Path::new("/a")).expect("a folder again");
        initramfs.entry(TRAILER, 0, &[]).expect("the end");
        let zeros = |count: usize| "0".repeat(count);
        let head = |inode: u32, mode: &str, size: u32, name: u32| {
            let zeros = [zeros(16), zeros(8), zeros(32), zeros(8)];
            let [owner, time, device, checksum] = zeros;
            format!("070701{inode:08x}{mode}{owner}00000001{time}{size:08x}{device}{name:08x}{checksum}")
        };
        let expected = [
            head(1, "000041ed", 0, 2) + "a\0",
            head(2, "000081ed", 5, 4) + "a/b\0\0\0hello\0\0\0",
            head(3, "00000000", 0, 11) + "TRAILER!!!\0\0\0\0",
        ];
        assert_eq!(String::from_utf8_lossy(&initramfs.archive), expected.concat());
    }
}
