//! Container images of components, as `host image` makes them; those of the host are tried under a containerd.

use crate::crafted;
use oci_spec::image::MediaType;
use serde_json::json;
use std::path::Path;
use tests::prelude::*;
use tests::{ImageLayout, LayerEntry};

const NAME: &str = "registry.example.com/team/triage:1.0";

/// Most bytes that an image of the triage may have.
const TRIAGE_MAX_BYTES: usize = 500_000;

/// Runs `host image` on the triage, with `NAME` for a name.
async fn image(output: &Path, args: &[&str]) -> Result<Output> {
    image_of(&tools::component("triage")?, output, args).await
}

async fn image_of(component: &Path, output: &Path, args: &[&str]) -> Result<Output> {
    let fixed = ["image".as_ref(), component.as_os_str(), "--output".as_ref(), output.as_os_str()];
    command::host(fixed.into_iter().chain(["--name", NAME].iter().chain(args).map(AsRef::as_ref))).await
}

/// An image of the triage with these arguments, read and checked.
async fn made(args: &[&str]) -> Result<ImageLayout> {
    let folder = crafted::folder()?;
    let tar = folder.path().join("image.tar");
    image(&tar, args).await?.success()?;
    ImageLayout::of_tar(&std::fs::read(tar)?)
}

/// What the component image holds by default: the component as a program, root's, for nobody to change.
fn component_file() -> Result<LayerEntry> {
    let bytes = std::fs::read(tools::component("triage")?)?;
    Ok(LayerEntry { path: "triage.wasm".to_owned(), mode: 0o755, owner: (0, 0), modified: 0, bytes })
}

/// An image of the triage is the component and nothing else, small, whole, and says what it is.
#[tokio::test]
async fn an_image_of_a_component_is_small_and_whole() -> Result<()> {
    let folder = crafted::folder()?;
    let (tar, plain) = (folder.path().join("triage.tar"), folder.path().join("plain.tar"));
    let printed = image(&tar, &[]).await?.success()?;
    image(&plain, &["--compression", "none"]).await?.success()?;
    let (gzip, plain) = (std::fs::read(&tar)?, std::fs::read(&plain)?);
    ensure!(gzip.len() < plain.len() / 2 && plain.len() < TRIAGE_MAX_BYTES, "{} and {}", gzip.len(), plain.len());
    ensure!(printed.stderr.contains(&format!("triage.tar: {} bytes", gzip.len())), "{printed:?}");

    let (gzip, plain) = (ImageLayout::of_tar(&gzip)?, ImageLayout::of_tar(&plain)?);
    assert_eq!(printed.stdout, format!("{NAME}@{}\n", gzip.digest));
    assert_eq!(*gzip.manifest.layers()[0].media_type(), MediaType::ImageLayerGzip);
    assert_eq!(*plain.manifest.layers()[0].media_type(), MediaType::ImageLayer);
    for layout in [&gzip, &plain] {
        assert_eq!(layout.files()?, [component_file()?]);
        assert_eq!(layout.annotations["io.containerd.image.name"], NAME);
        assert_eq!(layout.annotations["org.opencontainers.image.ref.name"], "1.0");
        let annotations = layout.manifest.annotations().clone().context("annotations")?;
        for (key, value) in [("created", "1970-01-01T00:00:00Z"), ("title", "triage"), ("version", "1.0")] {
            assert_eq!(annotations[&format!("org.opencontainers.image.{key}")], value);
        }
        let config = layout.image()?;
        assert_eq!((config.architecture().to_string(), config.os().to_string()), ("amd64".into(), "linux".into()));
        let process = config.config().clone().context("a configuration of the process")?;
        assert_eq!(process.user().as_deref(), Some("65532:65532"));
        assert_eq!(process.entrypoint().as_deref(), Some(&["/triage.wasm".to_owned()][..]));
        assert_eq!((process.cmd().as_deref(), process.env().as_deref()), (Some(&[][..]), Some(&[][..])));
    }
    Ok(())
}

/// The same image comes as a tar, as a folder and through a pipe; a folder that holds something stays as it is.
#[tokio::test]
async fn an_image_goes_where_it_is_wanted() -> Result<()> {
    let folder = crafted::folder()?;
    let (tar, layout) = (folder.path().join("triage.tar"), folder.path().join("layout/"));
    image(&tar, &[]).await?.success()?;
    image(&layout, &[]).await?.success()?;
    let of_folder = ImageLayout::of_folder(&layout)?;
    assert_eq!(of_folder.digest, ImageLayout::of_tar(&std::fs::read(&tar)?)?.digest);
    let again = image(&layout, &[]).await?;
    ensure!(again.code() == Some(1) && again.stderr.contains("is not empty"), "{again:?}");
    assert_eq!(ImageLayout::of_folder(&layout)?.digest, of_folder.digest);

    let piped = folder.path().join("piped.tar");
    let pipe = r#""$0" image "$1" --name "$2" --output - >"$3""#;
    let (host, component) = (tools::host()?, tools::component("triage")?);
    let args = ["-c".as_ref(), pipe.as_ref(), host.as_os_str(), component.as_os_str(), NAME.as_ref(), piped.as_ref()];
    let output = command::run("sh", args, b"", Duration::from_secs(60)).await?.success()?;
    assert_eq!(output.stderr, "");
    ensure!(std::fs::read(piped)? == std::fs::read(tar)?, "the piped image is another one");

    // By default beside the component.
    let component = crafted::file(folder.path(), "mine.wasm", component_file()?.bytes)?;
    command::host(["image".as_ref(), component.as_os_str(), "--name".as_ref(), NAME.as_ref()]).await?.success()?;
    let beside = ImageLayout::of_tar(&std::fs::read(folder.path().join("mine.tar"))?)?;
    assert_eq!(beside.files()?[0].path, "mine.wasm");
    Ok(())
}

/// The same component gives the same bytes wherever and whenever it is packed; the time in it is the one that was
/// asked for.
#[tokio::test]
async fn the_same_input_gives_the_same_image() -> Result<()> {
    let folder = crafted::folder()?;
    let copy = crafted::file(folder.path(), "triage.wasm", component_file()?.bytes)?;
    for format in ["component", "artifact"] {
        let (first, second) = (folder.path().join("first.tar"), folder.path().join("second.tar"));
        image(&first, &["--format", format]).await?.success()?;
        image_of(&copy, &second, &["--format", format]).await?.success()?;
        ensure!(std::fs::read(first)? == std::fs::read(second)?, "{format}: two images of one component");
    }

    let dated = folder.path().join("dated.tar");
    let dated_image = async |seconds: &str| {
        let host = tools::host()?;
        let epoch = format!("SOURCE_DATE_EPOCH={seconds}");
        let args = [epoch.as_ref(), host.as_os_str(), "image".as_ref(), copy.as_os_str(), "--name".as_ref()];
        let args = args.into_iter().chain([NAME.as_ref(), "--output".as_ref(), dated.as_os_str()]);
        command::run("env", args, b"", Duration::from_secs(60)).await
    };
    dated_image("1700000000").await?.success()?;
    let layout = ImageLayout::of_tar(&std::fs::read(&dated)?)?;
    assert_eq!(layout.image()?.created().as_deref(), Some("2023-11-14T22:13:20Z"));
    assert_eq!(layout.files()?[0].modified, 1_700_000_000);
    let refused = dated_image("yesterday").await?;
    ensure!(refused.code() == Some(1) && refused.stderr.contains("SOURCE_DATE_EPOCH=yesterday"), "{refused:?}");
    Ok(())
}

/// What the operator wants to be the default in every pod is in the image: arguments, environment, user, authorities;
/// and what is said about it.
#[tokio::test]
async fn defaults_of_the_pods_are_in_the_image() -> Result<()> {
    let folder = crafted::folder()?;
    let authority = "-----BEGIN CERTIFICATE-----\nMAo=\n-----END CERTIFICATE-----\n";
    let authorities = crafted::file(folder.path(), "ca.pem", authority)?.display().to_string();
    let source = "org.opencontainers.image.source=https://example.com/triage";
    let layout = made(&[
        "--arg=--slots",
        "--arg",
        "8",
        "--arg",
        "--dev",
        "--env",
        "MAILROOM_CONFIG=a=b\nc=d",
        "--env=EMPTY=",
        "--user",
        "1000",
        "--ca-certificates",
        &authorities,
        "--annotation",
        source,
        "--annotation=org.opencontainers.image.title=Triage",
    ])
    .await?;
    let process = layout.image()?.config().clone().context("a configuration of the process")?;
    assert_eq!(json!(process.cmd()), json!(["--slots", "8", "--dev"]));
    assert_eq!(json!(process.env()), json!(["MAILROOM_CONFIG=a=b\nc=d", "EMPTY="]));
    assert_eq!(process.user().as_deref(), Some("1000"));
    let annotations = layout.manifest.annotations().clone().context("annotations")?;
    assert_eq!(annotations["org.opencontainers.image.source"], "https://example.com/triage");
    assert_eq!(annotations["org.opencontainers.image.title"], "Triage");
    let files = layout.files()?;
    let paths: Vec<_> = files.iter().map(|file| file.path.as_str()).collect();
    assert_eq!(paths, ["triage.wasm", "etc/", "etc/ssl/", "etc/ssl/certs/", "etc/ssl/certs/ca-certificates.crt"]);
    assert_eq!(files[4].bytes, authority.as_bytes());
    Ok(())
}

/// The artifact is the component itself, described as the CNCF wants it.
#[tokio::test]
async fn an_artifact_is_the_component_and_its_description() -> Result<()> {
    let layout = made(&["--format", "artifact"]).await?;
    let manifest = &layout.manifest;
    assert_eq!(manifest.config().media_type().to_string(), "application/vnd.wasm.config.v0+json");
    assert_eq!(manifest.layers()[0].media_type().to_string(), "application/wasm");
    let annotations = manifest.layers()[0].annotations().clone().context("annotations of the layer")?;
    assert_eq!(annotations["org.opencontainers.image.title"], "triage.wasm");
    assert_eq!(layout.layers, [component_file()?.bytes]);
    let expected = json!({
        "created": "1970-01-01T00:00:00Z",
        "architecture": "wasm",
        "os": "wasip2",
        "layerDigests": [manifest.layers()[0].digest().to_string()],
        "component": {
            "exports": ["mailroom:triage/configured@0.1.0", "mailroom:triage/handler@0.1.0"],
            "imports": ["mailroom:triage/types@0.1.0"],
            "target": "mailroom:triage/triage@0.1.0",
        },
    });
    assert_eq!(layout.config, expected);
    Ok(())
}

/// A core module with a world is made a component first, as by the other commands.
#[tokio::test]
async fn a_core_module_becomes_an_image_of_a_component() -> Result<()> {
    let folder = crafted::folder()?;
    let module = crafted::file(folder.path(), "module.wasm", crafted::preview1_module()?)?;
    let (tar, component) = (folder.path().join("image.tar"), folder.path().join("component.wasm"));
    image_of(&module, &tar, &[]).await?.success()?;
    let compile = ["compile".as_ref(), module.as_os_str(), "--output".as_ref(), component.as_os_str()];
    command::host(compile).await?.success()?;
    let files = ImageLayout::of_tar(&std::fs::read(tar)?)?.files()?;
    assert_eq!((&*files[0].path, &files[0].bytes), ("module.wasm", &std::fs::read(component)?));
    Ok(())
}

/// A component that `host run` would refuse is refused when its image is made, not in the cluster; so is an executable
/// that would not start in the image. Nothing is written.
#[tokio::test]
async fn what_would_not_start_becomes_no_image() -> Result<()> {
    let folder = crafted::folder()?;
    let tar = folder.path().join("image.tar");
    let triage = component_file()?.bytes;
    let traps = r#"(module
        (memory (export "memory") 1)
        (func $start unreachable)
        (start $start)
        (func (export "cabi_realloc") (param i32 i32 i32 i32) (result i32) (i32.const 0))
        (func (export "mailroom:triage/handler@0.1.0#triage")
            (param i32 i32 i32 i32 i32 i32 i64 i32 i32 i32) (result i32) (i32.const 0)))"#;
    let world = "package test:crafted; world crafted { export mailroom:triage/handler@0.1.0; }";
    for (name, component, words) in [
        ("text.wasm", b"text".to_vec(), "no WebAssembly"),
        ("cut.wasm", triage[..5000].to_vec(), "no valid component"),
        ("no-world.wasm", wat::parse_str("(module)")?, "embeds no world"),
        ("tcp.wasm", crafted::guest_importing("wasi:sockets/tcp@0.2.6")?, "a guest gets no network"),
        ("shape.wasm", crafted::guest_of_another_shape()?, "does not fit the interfaces"),
        ("start.wasm", crafted::guest_of(traps, world)?, "breaks off before its first message"),
        ("http.wasm", std::fs::read(tools::component("triage-http")?)?, "`wasmtime serve`"),
    ] {
        let file = crafted::file(folder.path(), name, component)?;
        let refused = image_of(&file, &tar, &[]).await?;
        ensure!(refused.code() == Some(1) && refused.stderr.contains(words), "{name}: not {words:?}: {refused:?}");
        ensure!(refused.stderr.contains(name) && refused.stdout.is_empty(), "{name}: {refused:?}");
    }
    let compiled = folder.path().join("triage.cwasm");
    let triage = tools::component("triage")?;
    let compile = ["compile".as_ref(), triage.as_os_str(), "--output".as_ref(), compiled.as_os_str()];
    command::host(compile).await?.success()?;
    let refused = image_of(&compiled, &tar, &[]).await?;
    ensure!(refused.code() == Some(1) && refused.stderr.contains("compiled component"), "{refused:?}");

    let text = crafted::file(folder.path(), "text.wasm", "text")?.display().to_string();
    let missing = folder.path().join("missing").display().to_string();
    let private = "-----BEGIN CERTIFICATE-----\n-----BEGIN EC PRIVATE KEY-----\n";
    let private = crafted::file(folder.path(), "private.wasm", private)?.display().to_string();
    for (args, words) in [
        (&["--format", "host", "--executable", &text][..], "no 64-bit executable"),
        (&["--format", "host", "--executable", "/bin/sh"], "linked statically"),
        (&["--format", "host", "--executable", &missing], "No such file"),
        (&["--executable", &text], "--format host only"),
        (&["--format", "artifact", "--arg", "x"], "--arg: an artifact"),
        (&["--format", "artifact", "--env", "A=b"], "--env: an artifact"),
        (&["--format", "artifact", "--user", "1"], "--user: an artifact"),
        (&["--format", "artifact", "--ca-certificates", &text], "--ca-certificates: an artifact"),
        (&["--ca-certificates", &text], "no certificate in this file"),
        (&["--ca-certificates", &missing], "No such file"),
        (&["--ca-certificates", &private], "holds a private key"),
    ] {
        let refused = image(&tar, args).await?;
        ensure!(refused.code() == Some(1) && refused.stderr.contains(words), "{args:?}: not {words:?}: {refused:?}");
    }
    for output in ["image", "image.tar.gz", "nowhere/image.tar", "nowhere/layout/", "text.wasm/"] {
        let refused = image(&folder.path().join(output), &[]).await?;
        ensure!(refused.code() == Some(1) && refused.stderr.contains(output), "{output}: {refused:?}");
    }
    let mut left: Vec<_> = folder.path().read_dir()?.flatten().map(|entry| entry.file_name()).collect();
    left.retain(|name| Path::new(name).extension().is_none_or(|extension| extension != "wasm"));
    assert_eq!(left, ["triage.cwasm"]);
    Ok(())
}

/// A name that no registry takes, or that a node would look for elsewhere, is wrong usage; so is a user by name, since
/// the image has no list of them.
#[tokio::test]
async fn wrong_names_are_wrong_usage() -> Result<()> {
    let folder = crafted::folder()?;
    let tar = folder.path().join("image.tar").display().to_string();
    let triage = tools::component("triage")?.display().to_string();
    for (args, words) in [
        (&["--name", "triage:1.0"][..], "needs a registry and a tag"),
        (&["--name", "registry.example.com/team/triage"], "needs a registry and a tag"),
        (&["--name", "registry.example.com/Team:1"], "no path"),
        (&["--name", NAME, "--user", "nobody"], "takes numbers"),
        (&["--name", NAME, "--env", "MAILROOM_SLOTS"], "needs a name, = and a value"),
        (&["--name", NAME, "--format", "docker"], "possible values"),
        (&[], "--name"),
    ] {
        let fixed = ["image", &triage, "--output", &tar];
        let refused = command::host(fixed.iter().chain(args)).await?;
        ensure!(refused.code() == Some(2) && refused.stderr.contains(words), "{args:?}: not {words:?}: {refused:?}");
    }
    ensure!(!Path::new(&tar).exists(), "there is an image");
    Ok(())
}
