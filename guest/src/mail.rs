//! What is read from a mail: a few header fields, and the first text a person would read.
//!
//! Field values, encoded words, charsets and transfer encodings are `mail-parser`'s work; finding the fields and
//! the text is done here. A parser of whole mails decodes every attachment and nests as deep as the sender
//! likes, both of which an instance with little memory and one millisecond cannot afford. Here parts that are not
//! read are not decoded, and depth, number of parts and length of text have limits.

use std::borrow::Cow;

use mail_parser::decoders::base64::base64_decode;
use mail_parser::decoders::charsets::map::charset_decoder;
use mail_parser::decoders::html::html_to_text;
use mail_parser::decoders::quoted_printable::quoted_printable_decode;
use mail_parser::parsers::MessageStream;
use mail_parser::{ContentType, HeaderValue};
use memchr::{memchr, memchr_iter, memmem};
use wide::u8x32;

/// At most this much of the text is read.
pub const TEXT_MAX_BYTES: usize = 64 * 1024;
/// At most this much of an HTML text is converted, style sheets and all.
const HTML_MAX_BYTES: usize = 4 * TEXT_MAX_BYTES;
/// The colon after a field's name is looked for in so many bytes, whatever the length of a line that is no field. No name
/// that is asked for is longer than 25.
const NAME_MAX_BYTES: usize = 32;
/// A field longer than this is cut: long enough for a thread of hundreds, and a bound for decoding.
const FIELD_MAX_BYTES: usize = 16 * 1024;
/// The text is looked for this deep in multiparts and forwarded mails.
const DEPTH_MAX: usize = 8;
/// And in at most this many parts.
const PARTS_MAX: usize = 64;
/// At most this many addressees are read.
const ADDRESSEES_MAX: usize = 16;
/// At most this many addresses of people are read.
const PEOPLE_MAX: usize = 32;

/// A mail, as far as the rules want to know it.
#[derive(Debug)]
pub struct Mail<'a> {
    /// The header fields.
    pub fields: Fields<'a>,
    /// The subject, decoded. UTF-8, unless the sender put raw bytes of another charset there.
    pub subject: Cow<'a, [u8]>,
    /// The first readable text, decoded: at most [`TEXT_MAX_BYTES`], with the quoted parts still in it.
    pub text: Cow<'a, [u8]>,
    /// Whether the text was an HTML page.
    pub is_html: bool,
    /// All of it.
    pub data: &'a [u8],
}

/// The header fields that the rules look at, folded and encoded as they stand in the mail; empty when missing.
#[derive(Debug, Default)]
pub struct Fields<'a> {
    /// `Subject`
    pub subject: &'a [u8],
    /// `Date`
    pub date: &'a [u8],
    /// `From`
    pub from: &'a [u8],
    /// `To`
    pub to: &'a [u8],
    /// `Cc`
    pub cc: &'a [u8],
    /// `Delivered-To`, `X-Original-To`: the mailbox it arrived in, whatever the sender wrote
    pub delivered_to: &'a [u8],
    /// `Message-ID`
    pub message_id: &'a [u8],
    /// `In-Reply-To`
    pub in_reply_to: &'a [u8],
    /// `References`
    pub references: &'a [u8],
    /// `Importance`
    pub importance: &'a [u8],
    /// `Priority`
    pub priority: &'a [u8],
    /// `X-Priority`
    pub x_priority: &'a [u8],
    /// `Auto-Submitted`
    pub auto_submitted: &'a [u8],
    /// `Precedence`
    pub precedence: &'a [u8],
    /// `List-Id`
    pub list_id: &'a [u8],
    /// `List-Post`
    pub list_post: &'a [u8],
    /// `List-Unsubscribe`
    pub list_unsubscribe: &'a [u8],
    /// `X-Spam-Flag`
    pub spam_flag: &'a [u8],
    /// `Content-Type`
    content_type: &'a [u8],
    /// `Content-Transfer-Encoding`
    encoding: &'a [u8],
    /// `Content-Disposition`
    disposition: &'a [u8],
    /// Whether there was any field that says "this is a mail".
    is_mail: bool,
}

impl<'a> Mail<'a> {
    /// Reads a mail.
    ///
    /// # Errors
    /// The reason why these bytes are no mail.
    pub fn read(data: &'a [u8]) -> Result<Mail<'a>, String> {
        let content = after_mbox_line(data);
        if content.trim_ascii().is_empty() {
            return Err("no mail: nothing in it".to_owned());
        }
        let (fields, body) = Fields::split(content);
        if !fields.is_mail {
            return Err(
                "no mail: no From, To, Subject, Date, Message-ID, Received or MIME-Version field at the top".to_owned()
            );
        }
        let subject = decode_words(fields.subject);
        let mut finder = Finder { parts: 0, found_html: false };
        let text = finder.text(&fields, body, 0).unwrap_or_default();
        Ok(Mail { fields, subject, text, is_html: finder.found_html, data })
    }

    /// The local parts (before the `@`) of those the mail is addressed to, at most 16.
    pub fn addressees(&self) -> impl Iterator<Item = &'a [u8]> {
        let Fields { to, cc, delivered_to, .. } = self.fields;
        [delivered_to, to, cc].into_iter().flat_map(local_parts).take(ADDRESSEES_MAX)
    }

    /// The values of all header fields with this name, as they stand there.
    pub fn header(&self, name: &str) -> impl Iterator<Item = &'a [u8]> {
        let mut rest = after_mbox_line(self.data);
        while let [b'\r' | b'\n', tail @ ..] = rest {
            rest = tail;
        }
        std::iter::from_fn(move || {
            loop {
                let (field, tail) = split_field(rest)?;
                rest = tail;
                let colon = memchr(b':', field);
                if let Some(colon) =
                    colon.filter(|&colon| field[..colon].trim_ascii_end().eq_ignore_ascii_case(name.as_bytes()))
                {
                    return Some(field[colon + 1..].trim_ascii());
                }
            }
        })
    }

    /// The value of a header field as people read it.
    pub fn decoded<'v>(&self, value: &'v [u8]) -> Cow<'v, [u8]> {
        decode_words(value)
    }

    /// The address of the sender.
    pub fn sender(&self) -> Option<&'a [u8]> {
        addresses(self.fields.from).next()
    }

    /// The addresses of sender and addressees, at most 32.
    pub fn people(&self) -> impl Iterator<Item = &'a [u8]> {
        let Fields { from, to, cc, .. } = self.fields;
        [from, to, cc].into_iter().flat_map(addresses).take(PEOPLE_MAX)
    }

    /// The addresses of the mailboxes it was delivered to: ours.
    pub fn mailboxes(&self) -> impl Iterator<Item = &'a [u8]> {
        addresses(self.fields.delivered_to)
    }

    /// The name of the mailing list it came over.
    pub fn list(&self) -> Option<&'a [u8]> {
        let field = self.fields.list_id;
        let start = memchr(b'<', field).map_or(0, |start| start + 1);
        let end = memchr(b'>', field).filter(|&end| end >= start).unwrap_or(field.len());
        let id = field[start..end].trim_ascii();
        if id.is_empty() { addresses(self.fields.list_post).next() } else { Some(id) }
    }

    /// When it says that it was written, in seconds since 1970; none if it says so in no way that is understood.
    pub fn time(&self) -> Option<u64> {
        let mut field = self.fields.date.to_vec();
        field.push(b'\n');
        match MessageStream::new(&field).parse_date() {
            HeaderValue::DateTime(date) if date.is_valid() => u64::try_from(date.to_timestamp()).ok(),
            _ => None,
        }
    }

    /// Calls `read` with every stretch of the text that the sender wrote anew: not the quoted lines, the line that
    /// announces them, what follows "Original Message", or the signature.
    pub fn new_text(&self, mut read: impl FnMut(&[u8])) {
        self.text_by_origin(|origin, text| {
            if origin == Origin::New {
                read(text);
            }
        });
    }

    /// Calls `read` with every stretch of the text, in order, and who wrote it. Left out are signatures with all that
    /// follows them, the lines that announce a quotation, and both in what is quoted.
    pub fn text_by_origin(&self, mut read: impl FnMut(Origin, &[u8])) {
        let text = &*self.text;
        // The stretch so far; the line before this one, of the stretch.
        let (mut stretch, mut line_start, mut before) = (0, 0, 0);
        let mut origin = Some(Origin::New);
        for line_end in memchr_iter(b'\n', text).chain([text.len()]) {
            let next = (line_end + 1).min(text.len());
            let line = &text[line_start..line_end];
            let kind = Line::of(line);
            let next_origin = match kind {
                Line::New => Some(Origin::New),
                // In what is quoted, nothing follows a signature either.
                Line::Quoted if origin.is_none() => None,
                Line::Quoted => Some(Origin::Quoted),
                Line::Announcement | Line::QuotedEnd | Line::End => None,
                Line::QuotedAnnouncement => origin,
            };
            if next_origin != origin || kind == Line::QuotedAnnouncement {
                let is_wrapped = kind == Line::Announcement && announces(&text[before..line_start]);
                let end = if is_wrapped && !announces(line) { before.max(stretch) } else { line_start };
                if let Some(origin) = origin.filter(|_| stretch < end) {
                    read(origin, &text[stretch..end]);
                }
                stretch = if kind == Line::QuotedAnnouncement { next } else { line_start };
                origin = next_origin;
            }
            match kind {
                Line::End => return,
                // What it announces begins with the next line.
                Line::Announcement => (origin, stretch) = (Some(Origin::New), next),
                _ => {}
            }
            (before, line_start) = (line_start, next);
        }
        if let Some(origin) = origin.filter(|_| stretch < text.len()) {
            read(origin, &text[stretch..]);
        }
    }
}

/// Who wrote a stretch of text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The sender of this mail.
    New,
    /// Somebody that the sender quotes, in lines that begin with `>`.
    Quoted,
}

/// What a line of text is to somebody who looks for what is new.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Line {
    New,
    Quoted,
    /// "Ann wrote:"
    Announcement,
    /// The same in what is quoted.
    QuotedAnnouncement,
    /// Nothing of interest follows in what is quoted.
    QuotedEnd,
    /// Nothing new follows.
    End,
}

impl Line {
    fn of(line: &[u8]) -> Line {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let is_quoted = match line.first() {
            Some(b'>') => true,
            Some(b' ') => line.trim_ascii_start().starts_with(b">"),
            _ => false,
        };
        if is_quoted {
            let mut inner = line;
            while let [b'>' | b' ' | b'|', rest @ ..] = inner {
                inner = rest;
            }
            return match inner.first() {
                Some(b'-' | b'_') if ends_text(inner) || inner == b"--" => Line::QuotedEnd,
                _ if inner.ends_with(b":") && is_attribution(inner) => Line::QuotedAnnouncement,
                _ => Line::Quoted,
            };
        }
        match line.first() {
            Some(b'-' | b'_') if ends_text(line) => Line::End,
            _ if line.ends_with(b":") && is_attribution(line) => Line::Announcement,
            _ => Line::New,
        }
    }
}

/// Whether a line separates the text from a signature, a footer or a mail below it.
fn ends_text(line: &[u8]) -> bool {
    line == b"-- "
        || line == b"--"
        || line.starts_with(b"-----") && is_original_message(line)
        || line.len() >= 20 && line.iter().all(|&byte| byte == b'_')
}

/// Whether a line begins as those do that announce a quotation: "On Monday, 2 March 2026, Billing".
fn announces(line: &[u8]) -> bool {
    [&b"On "[..], b"Am ", b"Le ", b"El ", b"Op ", b"Il "].iter().any(|start| line.starts_with(start))
}

/// "-----Original Message-----" and its translations.
fn is_original_message(line: &[u8]) -> bool {
    let mut words = line;
    while let [b'-' | b' ', inner @ ..] | [inner @ .., b'-' | b' '] = words {
        words = inner;
    }
    let known: [&[u8]; 4] =
        [b"original message", b"urspr\xc3\xbcngliche nachricht", b"urspr\xfcngliche nachricht", b"message d'origine"];
    known.iter().any(|known| words.eq_ignore_ascii_case(known))
}

/// "On Monday, 2 March 2026, Billing wrote:" and its translations.
fn is_attribution(line: &[u8]) -> bool {
    let words = line[..line.len() - 1].trim_ascii_end();
    let known: [&[u8]; 4] = [b" wrote", b" schrieb", b" a \xc3\xa9crit", b" a \xe9crit"];
    known.iter().any(|known| words.ends_with(known))
}

/// What follows a leading mbox line `From sender date`, if there is one.
fn after_mbox_line(data: &[u8]) -> &[u8] {
    if data.starts_with(b"From ") {
        memchr(b'\n', data).map_or(&data[data.len()..], |end| &data[end + 1..])
    } else {
        data
    }
}

impl<'a> Fields<'a> {
    /// Takes the header apart and returns it with what follows it.
    ///
    /// A line that is no field is skipped. Of a repeated field the first one counts.
    fn split(data: &'a [u8]) -> (Fields<'a>, &'a [u8]) {
        let mut fields = Fields::default();
        let mut rest = data;
        // Some senders and many test files begin with empty lines.
        while let [b'\r' | b'\n', tail @ ..] = rest {
            rest = tail;
        }
        while let Some((field, tail)) = split_field(rest) {
            fields.note(field);
            rest = tail;
        }
        (fields, rest.strip_prefix(b"\r\n").or(rest.strip_prefix(b"\n")).unwrap_or(rest))
    }

    fn note(&mut self, field: &'a [u8]) {
        let head = first_bytes::<NAME_MAX_BYTES>(field);
        let colons = u8x32::new(head).simd_eq(u8x32::splat(b':')).to_bitmask();
        if colons == 0 {
            return;
        }
        let colon = colons.trailing_zeros() as usize;
        let lower = head.map(|byte| byte.to_ascii_lowercase());
        let name = lower[..colon].trim_ascii_end();
        let (place, makes_mail) = match (name.len(), name.first()) {
            (2, Some(b't')) if name == b"to" => (&mut self.to, true),
            (2, Some(b'c')) if name == b"cc" => (&mut self.cc, true),
            (4, Some(b'f')) if name == b"from" => (&mut self.from, true),
            (4, Some(b'd')) if name == b"date" => (&mut self.date, true),
            (7, Some(b's')) if name == b"subject" => (&mut self.subject, true),
            (7, Some(b'l')) if name == b"list-id" => (&mut self.list_id, false),
            (8, Some(b'r')) if name == b"received" => {
                self.is_mail = true;
                return;
            }
            (12, Some(b'm')) if name == b"mime-version" => {
                self.is_mail = true;
                return;
            }
            (8, Some(b'p')) if name == b"priority" => (&mut self.priority, false),
            (9, Some(b'l')) if name == b"list-post" => (&mut self.list_post, false),
            (10, Some(b'm')) if name == b"message-id" => (&mut self.message_id, true),
            (10, Some(b'r')) if name == b"references" => (&mut self.references, true),
            (10, Some(b'i')) if name == b"importance" => (&mut self.importance, false),
            (10, Some(b'x')) if name == b"x-priority" => (&mut self.x_priority, false),
            (10, Some(b'p')) if name == b"precedence" => (&mut self.precedence, false),
            (11, Some(b'i')) if name == b"in-reply-to" => (&mut self.in_reply_to, true),
            (11, Some(b'x')) if name == b"x-spam-flag" => (&mut self.spam_flag, false),
            (12, Some(b'd')) if name == b"delivered-to" => (&mut self.delivered_to, false),
            (13, Some(b'x')) if name == b"x-original-to" => (&mut self.delivered_to, false),
            (12, Some(b'c')) if name == b"content-type" => (&mut self.content_type, false),
            (14, Some(b'a')) if name == b"auto-submitted" => (&mut self.auto_submitted, false),
            (16, Some(b'l')) if name == b"list-unsubscribe" => (&mut self.list_unsubscribe, false),
            (19, Some(b'c')) if name == b"content-disposition" => (&mut self.disposition, false),
            (25, Some(b'c')) if name == b"content-transfer-encoding" => (&mut self.encoding, false),
            _ => return,
        };
        self.is_mail |= makes_mail;
        if place.is_empty() {
            let value = field[colon + 1..].trim_ascii();
            *place = &value[..value.len().min(FIELD_MAX_BYTES)];
        }
    }
}

/// The first field of a header, with the lines that continue it, and what follows; none at the header's end.
fn split_field(rest: &[u8]) -> Option<(&[u8], &[u8])> {
    if matches!(rest, [] | [b'\n', ..] | [b'\r', b'\n', ..]) {
        return None;
    }
    let mut end = 0;
    loop {
        end += memchr(b'\n', &rest[end..]).map_or(rest.len() - end, |line_end| line_end + 1);
        if !matches!(rest.get(end), Some(b' ' | b'\t')) {
            return Some(rest.split_at(end));
        }
    }
}

/// The first bytes, 0 for those that there are not.
#[inline]
pub(crate) fn first_bytes<const COUNT: usize>(bytes: &[u8]) -> [u8; COUNT] {
    bytes.first_chunk().copied().unwrap_or_else(|| {
        let mut first = [0; COUNT];
        first[..bytes.len()].copy_from_slice(bytes);
        first
    })
}

/// Decodes encoded words (`=?utf-8?Q?…?=`) and unfolds; a field without either is left where it is.
fn decode_words(value: &[u8]) -> Cow<'_, [u8]> {
    // A search for both bytes takes longer to prepare than most fields to look through.
    if !memchr_iter(b'=', value).any(|at| value.get(at + 1) == Some(&b'?')) {
        // A line end in a folded subject separates words as well as a space does.
        return Cow::Borrowed(value);
    }
    // The parser wants to see the end of the field.
    let mut field = value.to_vec();
    field.push(b'\n');
    match MessageStream::new(&field).parse_unstructured() {
        HeaderValue::Text(text) => Cow::Owned(text.into_owned().into_bytes()),
        _ => Cow::Borrowed(value),
    }
}

/// The local parts of the addresses in a field; names before them are passed over.
fn local_parts(field: &[u8]) -> impl Iterator<Item = &[u8]> {
    memchr_iter(b'@', field).map(|at| {
        let before = &field[..at];
        let start = before.iter().rposition(|&byte| matches!(byte, b' ' | b'\t' | b'\n' | b'<' | b',' | b':' | b'"'));
        &before[start.map_or(0, |start| start + 1)..]
    })
}

/// The addresses in a field, as they stand there; names before them are passed over.
fn addresses(field: &[u8]) -> impl Iterator<Item = &[u8]> {
    memchr_iter(b'@', field).filter_map(|at| {
        let ends = |byte: &u8| {
            matches!(byte, b' ' | b'\t' | b'\r' | b'\n' | b'<' | b'>' | b',' | b':' | b';' | b'"' | b'(' | b')')
        };
        let start = field[..at].iter().rposition(ends).map_or(0, |start| start + 1);
        let end = field[at..].iter().position(ends).map_or(field.len(), |end| at + end);
        (start < at && at + 1 < end).then(|| &field[start..end])
    })
}

/// Looks for the first readable text of a mail.
struct Finder {
    /// Parts looked at so far.
    parts: usize,
    /// Whether the last text found was an HTML page.
    found_html: bool,
}

impl Finder {
    /// The text of a part: of the plain kind if there is one, of HTML otherwise.
    fn text<'a>(&mut self, fields: &Fields<'a>, body: &'a [u8], depth: usize) -> Option<Cow<'a, [u8]>> {
        self.parts += 1;
        if depth > DEPTH_MAX || self.parts > PARTS_MAX || is_attachment(fields.disposition) {
            return None;
        }
        if let Some(charset) = plain_charset(fields.content_type) {
            self.found_html = false;
            return Some(plain_text(fields, charset, body));
        }
        let content_type = parse_content_type(fields.content_type);
        let Some(content_type) = &content_type else { return Some(plain_text(fields, None, body)) };
        let charset = content_type.attribute("charset");
        match (content_type.ctype(), content_type.subtype().unwrap_or_default()) {
            ("text", "html") => {
                self.found_html = true;
                Some(html_text(fields, charset, body))
            }
            ("text", "plain") => {
                self.found_html = false;
                Some(plain_text(fields, charset, body))
            }
            ("multipart", subtype) => {
                match content_type.attribute("boundary").filter(|boundary| !boundary.is_empty()) {
                    Some(boundary) => self.multipart(subtype, boundary.as_bytes(), body, depth),
                    None => Some(plain_text(fields, charset, body)),
                }
            }
            ("message", "rfc822" | "global") => {
                let (fields, body) = Fields::split(body);
                self.text(&fields, body, depth + 1)
            }
            _ => None,
        }
    }

    /// The text of the first part that has one; of several versions of the same the plain one, if it is not empty.
    fn multipart<'a>(&mut self, subtype: &str, boundary: &[u8], body: &'a [u8], depth: usize) -> Option<Cow<'a, [u8]>> {
        let mut fallback = None;
        for part in Parts::of(body, boundary) {
            if self.parts >= PARTS_MAX {
                break;
            }
            let (fields, body) = Fields::split(part);
            let is_html = starts_with_ignore_case(fields.content_type, b"text/html");
            if is_html && fallback.is_some() {
                continue;
            }
            match self.text(&fields, body, depth + 1) {
                Some(text) if text.trim_ascii().is_empty() => {}
                Some(text) if is_html && subtype == "alternative" => fallback = Some(text),
                Some(text) => return Some(text),
                None => {}
            }
        }
        fallback
    }
}

/// The parts between the delimiters of a multipart.
struct Parts<'a, 'b> {
    rest: &'a [u8],
    finder: memmem::Finder<'b>,
    boundary_length: usize,
    done: bool,
}

impl<'a, 'b> Parts<'a, 'b> {
    fn of(body: &'a [u8], boundary: &'b [u8]) -> Parts<'a, 'b> {
        let mut parts =
            Parts { rest: body, finder: memmem::Finder::new(boundary), boundary_length: boundary.len(), done: false };
        // What stands before the first delimiter is for readers that do not know MIME.
        parts.next();
        parts
    }
}

impl<'a> Iterator for Parts<'a, '_> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        if self.done {
            return None;
        }
        let mut from = 0;
        while let Some(found) = self.finder.find(&self.rest[from..]) {
            let (before, after) = (&self.rest[..from + found], &self.rest[from + found + self.boundary_length..]);
            // Another boundary may begin like this one.
            let is_whole = matches!(after, [] | [b' ' | b'\t' | b'\r' | b'\n', ..] | [b'-', b'-', ..]);
            let part = before.strip_suffix(b"--").filter(|part| matches!(part, [] | [.., b'\n']));
            if let Some(part) = part.filter(|_| is_whole) {
                // The line end before a delimiter belongs to the delimiter.
                let part = part.strip_suffix(b"\n").unwrap_or(part);
                self.done = after.starts_with(b"--");
                self.rest = memchr(b'\n', after).map_or(&[], |end| &after[end + 1..]);
                return Some(part);
            }
            from += found + self.boundary_length;
        }
        // Cut short: what there is, is the last part.
        self.done = true;
        Some(self.rest)
    }
}

/// The charset, if there is one, of a plain text whose type is written as most programs write it,
/// `text/plain; charset=utf-8`. The outer none: it takes a parser to say.
fn plain_charset(value: &[u8]) -> Option<Option<&str>> {
    let parameter = value.strip_prefix(b"text/plain")?;
    if parameter.is_empty() {
        return Some(None);
    }
    let charset = parameter.strip_prefix(b"; charset=")?;
    let is_plain = charset.iter().all(|byte| byte.is_ascii_alphanumeric() || *byte == b'-');
    if is_plain { Some(Some(str::from_utf8(charset).ok()?)) } else { None }
}

fn parse_content_type(value: &[u8]) -> Option<ContentType<'static>> {
    if value.is_empty() {
        return None;
    }
    let mut field = value.to_vec();
    field.push(b'\n');
    match MessageStream::new(&field).parse_content_type().into_owned() {
        HeaderValue::ContentType(content_type) => Some(content_type),
        _ => None,
    }
}

fn is_attachment(disposition: &[u8]) -> bool {
    starts_with_ignore_case(disposition, b"attachment")
}

fn starts_with_ignore_case(value: &[u8], start: &[u8]) -> bool {
    value.get(..start.len()).is_some_and(|head| head.eq_ignore_ascii_case(start))
}

/// A plain text, decoded to UTF-8 as far as its charset is known.
fn plain_text<'a>(fields: &Fields<'_>, charset: Option<&str>, body: &'a [u8]) -> Cow<'a, [u8]> {
    let mut text = decode(fields.encoding, body, TEXT_MAX_BYTES);
    if let Some(decoded) = decode_charset(&text, charset) {
        text = Cow::Owned(decoded.into_bytes());
    }
    cut(text, TEXT_MAX_BYTES)
}

/// The text of an HTML page, up to where a quoted mail begins.
fn html_text(fields: &Fields<'_>, charset: Option<&str>, body: &[u8]) -> Cow<'static, [u8]> {
    let mut html = decode(fields.encoding, body, HTML_MAX_BYTES);
    if let Some(quote) = memmem::find(&html, b"<blockquote") {
        html = cut(html, quote);
    }
    let html = match decode_charset(&html, charset) {
        Some(decoded) => Cow::Owned(decoded),
        None => String::from_utf8_lossy(&html),
    };
    cut(Cow::Owned(html_to_text(&html).into_bytes()), TEXT_MAX_BYTES)
}

/// Undoes the transfer encoding, at most up to `max_bytes` of the result. What cannot be decoded is left alone.
fn decode<'a>(encoding: &[u8], body: &'a [u8], max_bytes: usize) -> Cow<'a, [u8]> {
    // Encoded, every byte takes at most three, and lines end more often.
    let encoded = &body[..body.len().min(max_bytes * 7 / 2)];
    let decoded = if encoding.eq_ignore_ascii_case(b"base64") {
        base64_decode(encoded)
    } else if encoding.eq_ignore_ascii_case(b"quoted-printable") {
        quoted_printable_decode(encoded)
    } else {
        None
    };
    cut(decoded.map_or(Cow::Borrowed(body), Cow::Owned), max_bytes)
}

/// Decodes a charset that is not ASCII or UTF-8; none if there is nothing to decode or no such charset is known.
fn decode_charset(text: &[u8], charset: Option<&str>) -> Option<String> {
    let charset = charset?;
    if charset.eq_ignore_ascii_case("utf-8") || text.is_ascii() && !charset.to_ascii_lowercase().starts_with("utf") {
        return None;
    }
    charset_decoder(charset.as_bytes()).map(|decode| decode(text))
}

fn cut(text: Cow<'_, [u8]>, max_bytes: usize) -> Cow<'_, [u8]> {
    match text {
        Cow::Borrowed(text) => Cow::Borrowed(&text[..text.len().min(max_bytes)]),
        Cow::Owned(mut text) => {
            text.truncate(max_bytes);
            Cow::Owned(text)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A name ends where its colon is, if that is among the first 32 bytes.
    #[test]
    fn names_end_at_their_colon() {
        let padded = |blanks: usize| format!("Subject{}: x\n\n", " ".repeat(blanks));
        for (header, expected) in [
            ("Subject: x\n\n", "x"),
            ("sUbJeCt \t:x\n\n", "x"),
            ("Subject:x", "x"),
            ("Subject:", ""),
            (&padded(24), "x"),
            (&padded(25), ""),
            ("Subject\n\n", ""),
            (": x\n\n", ""),
            ("Subject\0: x\n\n", ""),
            ("Subjects: x\n\n", ""),
            ("X-A-Name-That-Is-Longer-Than-All-Others: Subject: x\nSubject: y\n\n", "y"),
        ] {
            let (fields, _) = Fields::split(header.as_bytes());
            assert_eq!(str::from_utf8(fields.subject), Ok(expected), "{header:?}");
        }
    }

    /// What is understood at a glance is what the parser makes of it, and most programs' way to write it is.
    #[test]
    fn a_charset_at_a_glance_is_that_of_the_parser() {
        let values = [
            ("text/plain", true),
            ("text/plain; charset=utf-8", true),
            ("text/plain; charset=ISO-8859-15", true),
            ("text/plain; charset=", true),
            ("text/plain; charset=us_ascii", false),
            ("text/plain; charset=\"utf-8\"", false),
            ("text/plain; charset=utf-8; format=flowed", false),
            ("text/plain; charset=utf-8 ", false),
            ("text/plain;\r\n charset=utf-8", false),
            ("text/plain2", false),
            ("Text/Plain", false),
            ("text/html; charset=utf-8", false),
            ("text", false),
            ("", false),
        ];
        for (value, at_a_glance) in values {
            let charset = plain_charset(value.as_bytes());
            assert_eq!(charset.is_some(), at_a_glance, "{value}");
            if let Some(charset) = charset {
                let parsed = parse_content_type(value.as_bytes()).expect(value);
                assert_eq!((parsed.ctype(), parsed.subtype()), ("text", Some("plain")), "{value}");
                assert_eq!(charset.unwrap_or_default(), parsed.attribute("charset").unwrap_or_default(), "{value}");
            }
        }
    }
}
