//! Plain HTTP/1.1 over a TCP connection of its own: as much as an admin endpoint or `wasmtime serve` needs.

use anyhow::{Context as _, Result, bail};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// A whole exchange takes at most this long.
const DEADLINE: Duration = Duration::from_secs(30);

/// A response read to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// The header lines, as they came.
    pub head: String,
    /// The body, as text.
    pub body: String,
}

/// GETs `url`, such as `http://127.0.0.1:8080/metrics`.
///
/// # Errors
/// When there is no complete HTTP response within 30 s.
pub async fn get(url: &str) -> Result<Response> {
    request("GET", url, b"").await
}

/// Sends `body` to `url` with any method.
///
/// # Errors
/// When there is no complete HTTP response within 30 s.
pub async fn request(method: &str, url: &str, body: &[u8]) -> Result<Response> {
    match timeout(DEADLINE, exchange(method, url, body)).await {
        Ok(response) => response.with_context(|| format!("{method} {url}")),
        Err(_) => bail!("{method} {url}: no response within {DEADLINE:?}"),
    }
}

async fn exchange(method: &str, url: &str, body: &[u8]) -> Result<Response> {
    let rest = url.strip_prefix("http://").context("only http:// is spoken here")?;
    let (address, path) = rest.split_once('/').unwrap_or((rest, ""));
    let mut connection = TcpStream::connect(address).await?;
    let length = body.len();
    let head = format!(
        "{method} /{path} HTTP/1.1\r\nhost: {address}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n"
    );
    connection.write_all(head.as_bytes()).await?;
    connection.write_all(body).await?;
    let mut response = Vec::new();
    connection.read_to_end(&mut response).await?;
    parse(&response)
}

fn parse(response: &[u8]) -> Result<Response> {
    let end =
        response.windows(4).position(|window| window == b"\r\n\r\n").context("the response has no end of head")?;
    let head = String::from_utf8_lossy(&response[..end]).into_owned();
    let body = &response[end + 4..];
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    let header = |name: &str| {
        let mut headers = head.lines().skip(1).filter_map(|line| line.split_once(':'));
        headers.find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim().to_owned())
    };
    let body = if header("transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked")) {
        unchunked(body).context("the chunked body is cut short")?
    } else {
        let length = header("content-length").and_then(|value| value.parse::<usize>().ok());
        if length.is_some_and(|length| length != body.len()) {
            bail!("the body is cut short");
        }
        body.to_vec()
    };
    let status = status.with_context(|| format!("not an HTTP response: {head:?}"))?;
    Ok(Response { status, body: String::from_utf8_lossy(&body).into_owned(), head })
}

/// The content of a body in chunked transfer encoding; `None` when it is incomplete.
fn unchunked(mut rest: &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let line = rest.windows(2).position(|window| window == b"\r\n")?;
        let size = std::str::from_utf8(&rest[..line]).ok()?.split(';').next()?.trim();
        let size = usize::from_str_radix(size, 16).ok()?;
        rest = &rest[line + 2..];
        if size == 0 {
            return Some(body);
        }
        body.extend_from_slice(rest.get(..size)?);
        rest = rest.get(size + 2..)?;
    }
}
