//! Components and core modules made for a test, where none that is built has the fault in question.

use std::path::Path;
use tests::prelude::*;
use wit_component::{ComponentEncoder, StringEncoding, dummy_module, embed_component_metadata};
use wit_parser::{ManglingAndAbi, Resolve};

/// A guest that also calls `interface`, such as `wasi:sockets/tcp@0.2.6`. It traps if it is ever run.
pub fn guest_importing(interface: &str) -> Result<Vec<u8>> {
    let (package, rest) = interface.split_once('/').context("no interface name")?;
    let (name, version) = rest.split_once('@').context("no version")?;
    let mut resolve = Resolve::default();
    resolve.push_path(tools::workspace().join("wit"))?;
    let imported = format!("package {package}@{version};\ninterface {name} {{ reach: func(); }}");
    resolve.push_str("imported.wit", &imported)?;
    encoded(resolve, &format!("import {interface}; export mailroom:triage/handler@0.1.0;"))
}

/// A component that exports the handler under its name but with other parameters.
pub fn guest_of_another_shape() -> Result<Vec<u8>> {
    let mut resolve = Resolve::default();
    let handler = "package mailroom:triage@0.1.0;\ninterface handler { triage: func(mail: string) -> string; }";
    resolve.push_str("handler.wit", handler)?;
    encoded(resolve, "export mailroom:triage/handler@0.1.0;")
}

/// A guest that is told its configuration in another form than the interface has.
pub fn guest_configured_otherwise() -> Result<Vec<u8>> {
    let wit = tools::workspace().join("wit");
    let interface = std::fs::read_to_string(wit.join("triage.wit"))?;
    let other =
        interface.replace("configure: func(pairs: list<tuple<string, string>>);", "configure: func(text: string);");
    ensure!(other != interface, "wit/triage.wit has no such function");
    let mut resolve = Resolve::default();
    for package in std::fs::read_dir(wit.join("deps"))? {
        resolve.push_path(package?.path())?;
    }
    resolve.push_str("triage.wit", &other)?;
    encoded(resolve, "export mailroom:triage/handler@0.1.0; export mailroom:triage/configured@0.1.0;")
}

/// A component of the core module `module`, in wat, for the world `crafted` of the package that `world` describes.
pub fn guest_of(module: &str, world: &str) -> Result<Vec<u8>> {
    let mut module = wat::parse_str(module)?;
    let mut resolve = Resolve::default();
    resolve.push_path(tools::workspace().join("wit"))?;
    let package = resolve.push_str("crafted.wit", world)?;
    let world = resolve.select_world(&[package], Some("crafted"))?;
    embed_component_metadata(&mut module, &resolve, world, StringEncoding::UTF8)?;
    ComponentEncoder::default().validate(true).module(&module)?.encode()
}

fn encoded(mut resolve: Resolve, world: &str) -> Result<Vec<u8>> {
    let package = resolve.push_str("crafted.wit", &format!("package test:crafted;\nworld crafted {{ {world} }}"))?;
    let world = resolve.select_world(&[package], None)?;
    let mut module = dummy_module(&resolve, world, ManglingAndAbi::Standard32);
    embed_component_metadata(&mut module, &resolve, world, StringEncoding::UTF8)?;
    ComponentEncoder::default().validate(true).module(&module)?.encode()
}

/// A core module as a toolchain for WASI preview 1 leaves it, with the world `triage` embedded: it writes a line to
/// standard output and answers every message with low priority, new issue `p1`, queue `preview1`, no reasons.
pub fn preview1_module() -> Result<Vec<u8>> {
    let mut module = wat::parse_str(
        r#"(module
            (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
            ;; Beyond the data lies what the adapter asks for: a page and a half.
            (memory (export "memory") 4)
            (global $free (mut i32) (i32.const 1024))
            ;; At 0 what to write, at 16 the answer: ok, low, new, and where the issue, the queue and the reasons are.
            (data (i32.const 0) "\40\00\00\00\13\00\00\00")
            (data (i32.const 16) "\00\00\00\00\00\00\00\00\00\00\00\00\58\00\00\00\02\00\00\00\60\00\00\00\08\00\00\00\00\00\00\00\00\00\00\00")
            (data (i32.const 64) "preview 1 was here\n")
            (data (i32.const 88) "p1")
            (data (i32.const 96) "preview1")
            (func (export "cabi_realloc") (param i32 i32 i32 i32) (result i32)
                ;; Never freed: an instance lives for one message.
                (global.set $free (i32.and (i32.add (global.get $free) (i32.const 15)) (i32.const -16)))
                (global.get $free)
                (global.set $free (i32.add (global.get $free) (local.get 3))))
            (func (export "mailroom:triage/handler@0.1.0#triage")
                (param i32 i32 i32 i32 i32 i32 i64 i32 i32 i32) (result i32)
                (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))
                (i32.const 16)))"#,
    )?;
    let mut resolve = Resolve::default();
    let (package, _) = resolve.push_path(tools::workspace().join("wit"))?;
    let world = resolve.select_world(&[package], Some("triage"))?;
    embed_component_metadata(&mut module, &resolve, world, StringEncoding::UTF8)?;
    Ok(module)
}

/// Writes `bytes` to a file called `name` in `folder` and returns its path.
pub fn file(folder: &Path, name: &str, bytes: impl AsRef<[u8]>) -> Result<std::path::PathBuf> {
    let path = folder.join(name);
    std::fs::write(&path, bytes).with_context(|| format!("write {}", path.display()))?;
    Ok(path)
}

/// A temporary folder, gone when dropped.
pub fn folder() -> Result<tempfile::TempDir> {
    tempfile::Builder::new().prefix("mailroom-test-").tempdir().context("make a temporary folder")
}
