//! The executable that goes into an image: what it must be to start there, and how it is made small.

use anyhow::{Context, Result, bail, ensure};
use object::elf::{EM_AARCH64, EM_X86_64, ET_DYN, ET_EXEC, FileHeader64, PT_INTERP};
use object::endian::{LittleEndian as Little, U16, U64};
use object::pod;
use object::read::elf::{FileHeader as _, ProgramHeader as _};
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

/// The number of this machine's kind of processor in executables.
const MACHINE: u16 = if cfg!(target_arch = "aarch64") { EM_AARCH64 } else { EM_X86_64 };

/// `executable` without what is not loaded: symbols and debugging information, which are most of it.
///
/// # Errors
/// What would not start in an empty image on a machine like this one: no executable, one for another machine, or one
/// that loads libraries.
pub fn stripped(mut executable: Vec<u8>) -> Result<Vec<u8>> {
    let header = FileHeader64::<Little>::parse(&*executable).ok().filter(|header| header.endian().is_ok());
    let header = header.context("is no 64-bit executable for Linux")?;
    ensure!([ET_EXEC, ET_DYN].contains(&header.e_type(Little)), "is an ELF file, but no executable");
    ensure!(header.e_machine(Little) == MACHINE, "is for another kind of processor than this machine's");
    let segments = header.program_headers(Little, &*executable).ok().context("was cut short")?;
    if segments.iter().any(|segment| segment.p_type(Little) == PT_INTERP) {
        bail!("loads libraries, which an empty image has not; --executable names one that is linked statically");
    }
    let headers_end = header.e_phoff(Little) + size_of_val(segments) as u64;
    let ends = segments.iter().map(|segment| segment.p_offset(Little).saturating_add(segment.p_filesz(Little)));
    let end = usize::try_from(ends.fold(headers_end, u64::max))?;
    ensure!(end <= executable.len(), "was cut short");
    executable.truncate(end);
    // The list of sections was behind that.
    let (header, _) = pod::from_bytes_mut::<FileHeader64<Little>>(&mut executable).ok().context("was cut short")?;
    header.e_shoff = U64::new(Little, 0);
    header.e_shnum = U16::new(Little, 0);
    header.e_shstrndx = U16::new(Little, 0);
    Ok(executable)
}

/// Lets `executable` load `machine_code`, as it will have to in its image.
///
/// # Errors
/// What it says against that.
pub fn try_out(executable: &Path, machine_code: &[u8]) -> Result<()> {
    let folder = tempfile::tempdir().context("make a temporary folder")?;
    let [component, mails] = ["component.cwasm", "mails"].map(|name| folder.path().join(name));
    fs::write(&component, machine_code).with_context(|| format!("write {}", component.display()))?;
    fs::create_dir(&mails).with_context(|| format!("create {}", mails.display()))?;
    let mut command = Command::new(executable);
    command.env_clear().stdin(Stdio::null()).arg("triage").args([&component, &mails]);
    let output = command.output().with_context(|| format!("start {}", executable.display()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let said = said.lines().last().unwrap_or_default().trim_start_matches("error: ");
        bail!("{}: cannot run what this host compiles ({}): {said}", executable.display(), output.status);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The smallest executable that says all that is asked: a header, one segment, and something behind.
    fn executable(segment: u32) -> Vec<u8> {
        let mut header = FileHeader64::<Little> {
            e_ident: object::elf::Ident {
                magic: object::elf::ELFMAG,
                class: object::elf::ELFCLASS64,
                data: object::elf::ELFDATA2LSB,
                version: object::elf::EV_CURRENT,
                os_abi: 0,
                abi_version: 0,
                padding: [0; 7],
            },
            e_type: U16::new(Little, ET_DYN),
            e_machine: U16::new(Little, MACHINE),
            e_version: object::endian::U32::new(Little, 1),
            e_entry: U64::new(Little, 0),
            e_phoff: U64::new(Little, 64),
            e_shoff: U64::new(Little, 120),
            e_flags: object::endian::U32::new(Little, 0),
            e_ehsize: U16::new(Little, 64),
            e_phentsize: U16::new(Little, 56),
            e_phnum: U16::new(Little, 1),
            e_shentsize: U16::new(Little, 64),
            e_shnum: U16::new(Little, 1),
            e_shstrndx: U16::new(Little, 1),
        };
        header.e_version = object::endian::U32::new(Little, 1);
        let mut bytes = pod::bytes_of(&header).to_vec();
        bytes.extend(segment.to_le_bytes());
        bytes.extend([0; 4]);
        // Offset, two addresses, size in the file, size in memory, alignment.
        [0, 0, 0, 124_u64, 124, 1].into_iter().for_each(|number| bytes.extend(number.to_le_bytes()));
        bytes.extend(b"code, symbols");
        bytes
    }

    #[test]
    fn only_what_is_loaded_is_kept() {
        let whole = executable(object::elf::PT_LOAD);
        let small = stripped(whole.clone()).expect("a static executable");
        assert_eq!(small.len(), 124);
        assert!(small.ends_with(b"code"));
        let header = FileHeader64::<Little>::parse(&*small).expect("an executable");
        assert_eq!((header.e_shoff(Little), header.e_shnum(Little), header.e_shstrndx(Little)), (0, 0, 0));
        assert_eq!(stripped(small.clone()).expect("nothing to strip"), small);
    }

    #[test]
    fn what_would_not_start_is_refused() {
        let other = |at: usize, byte: u8| {
            let mut bytes = executable(object::elf::PT_LOAD);
            bytes[at] = byte;
            bytes
        };
        for (bytes, words) in [
            (b"#!/bin/sh\n".to_vec(), "no 64-bit executable"),
            (Vec::new(), "no 64-bit executable"),
            (other(4, 1), "no 64-bit executable"),
            (other(5, 2), "no 64-bit executable"),
            (other(16, 1), "no executable"),
            (other(18, 3), "another kind of processor"),
            (executable(PT_INTERP), "linked statically"),
            (executable(object::elf::PT_LOAD)[..100].to_vec(), "cut short"),
            (executable(object::elf::PT_LOAD)[..122].to_vec(), "cut short"),
            (other(96 + 7, 0xff), "cut short"),
        ] {
            let refused = stripped(bytes).expect_err(words).to_string();
            assert!(refused.contains(words), "{refused:?}: not {words:?}");
        }
    }
}
