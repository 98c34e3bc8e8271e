//! `man/kuf.3` is what `include/kuf.h` and `examples/c/minimal.c` say today, laid out for man(1). `KUF_BLESS=1` writes it.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

#[test]
fn committed_page_is_the_generated_one() {
    let made = page(&read("include/kuf.h"), &read("examples/c/minimal.c"));
    let path = at("man/kuf.3");
    if std::env::var_os("KUF_BLESS").is_some() {
        std::fs::write(&path, &made).expect("write man/kuf.3");
    } else {
        let committed = std::fs::read_to_string(&path).expect("read man/kuf.3");
        let hint = "run `KUF_BLESS=1 cargo test --test manpage` and commit the result";
        assert!(committed == made, "man/kuf.3 has drifted from include/kuf.h or examples/c/minimal.c: {hint}");
    }
    renders_without_a_warning(&path);
}

#[test]
fn readme_shows_the_example_as_it_is() {
    let example = read("examples/c/minimal.c");
    let program = &example[example.find("#define").expect("code")..];
    assert!(read("README.md").contains(program), "README.md shows another program than examples/c/minimal.c");
}

fn renders_without_a_warning(page: &Path) {
    match Command::new("groff").args(["-man", "-ww", "-z", "-Tutf8"]).arg(page).output() {
        Ok(run) => assert!(
            run.status.success() && run.stderr.is_empty(),
            "groff says: {}",
            String::from_utf8_lossy(&run.stderr)
        ),
        Err(_) => println!("SKIP rendering man/kuf.3: groff is not installed"),
    }
}

fn at(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn read(path: &str) -> String {
    std::fs::read_to_string(at(path)).unwrap_or_else(|e| panic!("read {path}: {e}"))
}

// ---- The header, taken apart ----

/// A declaration and the comment in front of it, one string a line, without the comment's frame.
struct Item {
    comment: Vec<String>,
    code: Vec<String>,
}

impl Item {
    /// `struct kuf_options`, `kuf_fill_fn`, `kuf_open`, `KUF_ALL`: what it declares.
    fn name(&self) -> &str {
        let first = &self.code[0];
        if let Some(rest) = first.strip_prefix("#define ") {
            return rest.split(' ').next().unwrap_or(rest);
        }
        if let Some(rest) = first.strip_prefix("struct ") {
            return rest.trim_end_matches([' ', '{', ';']);
        }
        let before = match first.strip_prefix("typedef ") {
            Some(rest) => rest.split(")(").next().unwrap_or(rest),
            None => first.split('(').next().unwrap_or(first),
        };
        before.rsplit([' ', '*', '(']).next().unwrap_or(before)
    }

    fn is_function(&self) -> bool {
        !["#define", "struct", "typedef"].iter().any(|word| self.code[0].starts_with(word))
    }
}

/// The comment at the top, and everything declared, in order.
fn take_apart(header: &str) -> (Vec<String>, Vec<Item>) {
    let (mut preamble, mut items) = (Vec::new(), Vec::new());
    let mut comment = Vec::new();
    let mut lines = header.lines();
    while let Some(line) = lines.next() {
        if let Some(text) = comment_at(line, &mut lines) {
            comment = text;
            continue;
        }
        if line.is_empty() {
            if preamble.is_empty() && comment.len() > 1 {
                preamble = std::mem::take(&mut comment);
            }
            continue;
        }
        if comment.is_empty() {
            continue;
        }
        let mut code = vec![line.to_owned()];
        let ends = |code: &str| match code {
            define if define.starts_with("#define") => true,
            body if body.starts_with("struct") && body.contains('{') => body.ends_with("\n};"),
            other => other.ends_with(';'),
        };
        while !ends(&code.join("\n")) {
            code.push(lines.next().expect("a declaration that ends").to_owned());
        }
        items.push(Item { comment: std::mem::take(&mut comment), code });
    }
    (preamble, items)
}

/// The comment that starts at `line`, if one does; takes the rest of it from `lines`.
fn comment_at<'a>(line: &str, lines: &mut impl Iterator<Item = &'a str>) -> Option<Vec<String>> {
    let start = line.trim_start().strip_prefix("/*")?;
    if let Some(only) = start.strip_suffix("*/") {
        return Some(vec![only.trim().to_owned()]);
    }
    let body = lines.take_while(|l| l.trim() != "*/");
    Some(
        body.map(|l| l.trim_start().strip_prefix('*').map_or("", |l| l.strip_prefix(' ').unwrap_or(l)).to_owned())
            .collect(),
    )
}

// ---- The page ----

const SEE_ALSO: &str =
    "userfaultfd(2), ioctl_userfaultfd(2), madvise(2), memfd_create(2), fallocate(2), sigaction(2), pkg-config(1)";

fn page(header: &str, example: &str) -> String {
    let (preamble, items) = take_apart(header);
    let value = |name: &str| {
        let line = header.lines().find_map(|l| l.strip_prefix("#define ")?.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("{name} is in the header")).to_owned()
    };
    let version = ["KUF_VERSION_MAJOR", "KUF_VERSION_MINOR", "KUF_VERSION_PATCH"].map(value).join(".");
    let functions: Vec<&Item> = items.iter().filter(|item| item.is_function()).collect();
    let starting = |word: &str| items.iter().filter(|item| item.code[0].starts_with(word)).collect::<Vec<_>>();

    let mut out = String::new();
    out.push_str(".\\\" SPDX-License-Identifier: MIT OR Apache-2.0\n");
    out.push_str(".\\\" Made from include/kuf.h and examples/c/minimal.c by tests/manpage.rs: change those.\n");
    // One space between sentences, wherever the lines of this source end; nothing hyphenated; ragged right margin.
    let _ = writeln!(
        out,
        ".TH KUF 3 \"\" \"libkuf {version}\" \"Library Functions Manual\"\n.ss 12 0\n.nr HY 0\n.nh\n.ad l"
    );

    out.push_str(".SH NAME\n.nh\n");
    let names: Vec<&str> = std::iter::once("kuf").chain(functions.iter().map(|f| f.name())).collect();
    let _ = writeln!(out, "{}\n\\- {}", wrapped(&names.join(", ")), escaped(title(&preamble)));

    out.push_str(".SH SYNOPSIS\n.nf\n.B #include <kuf.h>\n.PP\n");
    out.push_str("\\fBcc\\fR \\fIprogram.c\\fR \\fB$(pkg-config \\-\\-cflags \\-\\-libs kuf)\\fR\n.PP\n");
    for function in &functions {
        prototype(&mut out, function);
    }
    out.push_str(".fi\n.SH DESCRIPTION\n.nh\n");
    // Past the title line, which is NAME.
    prose(&mut out, &preamble[2..]);

    out.push_str(".SH CALLS\n");
    for function in &functions {
        let _ = writeln!(out, ".SS {}", function.name());
        out.push_str(".nf\n");
        prototype(&mut out, function);
        out.push_str(".fi\n.PP\n");
        call(&mut out, function);
    }

    out.push_str(".SH CALLBACKS\n");
    for callback in starting("typedef") {
        let _ = writeln!(out, ".SS {}", callback.name());
        out.push_str(".nf\n");
        prototype(&mut out, callback);
        out.push_str(".fi\n.PP\n");
        prose(&mut out, &callback.comment);
    }

    out.push_str(".SH STRUCTURES\n");
    for structure in starting("struct") {
        let _ = writeln!(out, ".SS struct {}", structure.name());
        prose(&mut out, &structure.comment);
        fields(&mut out, structure);
    }

    out.push_str(".SH CONSTANTS\n");
    let mut group = String::new();
    for define in starting("#define") {
        let name = define.name();
        let next = heading(name);
        if next != group {
            let _ = writeln!(out, ".SS {}", escaped(&next));
            group = next;
        }
        let value = define.code[0].rsplit_once(name).map_or("", |(_, value)| value.trim());
        let _ = writeln!(out, ".TP\n\\fB{name}\\fR = {}", escaped(value.trim_matches(['(', ')'])));
        in_item(&mut out, &define.comment);
    }

    out.push_str(".SH EXAMPLE\n.EX\n");
    for line in example.lines().filter(|line| !line.contains("SPDX")) {
        code_line(&mut out, line);
    }
    out.push_str(".EE\n.SH SEE ALSO\n");
    let manual = |page: &str| page.split_once('(').map(|(name, rest)| format!("\\fB{name}\\fR({rest}"));
    let pages: Vec<String> = SEE_ALSO.split(' ').filter_map(manual).collect();
    let _ = writeln!(out, "{}", pages.join("\n"));
    out
}

/// `kuf.h - what it is` without the file's name.
fn title(preamble: &[String]) -> &str {
    preamble[0].split_once(" - ").expect("a title").1
}

fn heading(constant: &str) -> String {
    let known = [
        ("KUF_VERSION_", "Version of the header"),
        ("KUF_MECHANISM_", "Mechanisms"),
        ("KUF_OPEN_", "kuf_options.flags"),
        ("KUF_FILL_", "kuf_fill.flags"),
        ("KUF_MEMORY_", "kuf_memory.flags"),
        ("KUF_FAULT_", "kuf_fault.flags"),
        ("KUF_RESOLVE_", "Flags of kuf_resolve"),
        ("KUF_DISCARD_", "Flags of kuf_discard"),
        ("KUF_POPULATE_", "kuf_populate.flags"),
        ("KUF_CLOSE_", "Flags of kuf_close and kuf_remove_memory"),
        ("KUF_PROGRESS_", "kuf_progress.flags"),
        ("KUF_EVENT_", "kuf_event.kind"),
        ("KUF_LOG_", "Log levels"),
        ("KUF_FEATURE_", "Features"),
        ("KUF_HISTOGRAM_", "Histograms"),
    ];
    if ["KUF_FILLED", "KUF_ZERO", "KUF_DEFERRED"].contains(&constant) {
        return "What a fill callback returns".to_owned();
    }
    match known.iter().find(|(prefix, _)| constant.starts_with(prefix)) {
        Some((_, heading)) => (*heading).to_owned(),
        None => "Addresses".to_owned(),
    }
}

fn prototype(out: &mut String, item: &Item) {
    let mut line = String::new();
    for argument in joined(&item.code).split_inclusive(", ") {
        if line.len() + argument.trim_end().len() > 80 {
            let _ = writeln!(out, "\\fB{}\\fR", escaped(line.trim_end()));
            line = "        ".to_owned();
        }
        line.push_str(argument);
    }
    let _ = writeln!(out, "\\fB{}\\fR", escaped(&line));
}

/// Paragraphs, lists ("  - ") and code (five blanks) as the comments of the header have them.
fn prose(out: &mut String, lines: &[String]) {
    for paragraph in lines.split(|line| line.is_empty()) {
        if paragraph.is_empty() {
            continue;
        }
        if paragraph.iter().all(|line| line.starts_with("    ")) {
            out.push_str(".PP\n.in +4n\n.EX\n");
            paragraph.iter().for_each(|line| code_line(out, &line[4..]));
            out.push_str(".EE\n.in\n");
            continue;
        }
        let first_item = paragraph.iter().position(|line| line.starts_with("  - ")).unwrap_or(paragraph.len());
        if first_item > 0 {
            let _ = writeln!(out, ".PP\n{}", wrapped(&joined(&paragraph[..first_item])));
        }
        let mut item = Vec::new();
        for line in &paragraph[first_item..] {
            if let Some(first) = line.strip_prefix("  - ") {
                bullet(out, &mut item);
                item.push(first.to_owned());
            } else {
                item.push(line.clone());
            }
        }
        bullet(out, &mut item);
    }
}

fn bullet(out: &mut String, item: &mut Vec<String>) {
    if !item.is_empty() {
        let _ = writeln!(out, ".IP \\(bu 2\n{}", wrapped(&joined(item)));
        item.clear();
    }
}

/// A call's comment: prose, its arguments, what it returns, its errors.
fn call(out: &mut String, function: &Item) {
    let code = function.code.join(" ");
    let inside = code.split_once('(').map_or("", |(_, rest)| rest.trim_end_matches(");"));
    let arguments: Vec<&str> = inside.split(',').filter_map(|argument| argument.rsplit([' ', '*']).next()).collect();
    for paragraph in function.comment.split(|line| line.is_empty()) {
        let text = joined(paragraph);
        let labelled = labels(&text, |label| label.split(", ").all(|name| arguments.contains(&name)));
        if labelled.first().is_some_and(|(before, _)| *before == 0) {
            for (n, (start, label)) in labelled.iter().enumerate() {
                let end = labelled.get(n + 1).map_or(text.len(), |(next, _)| *next);
                let _ = writeln!(out, ".TP\n.I {label}\n{}", wrapped(text[start + label.len() + 1..end].trim()));
            }
        } else if text.starts_with("Returns ") {
            returns(out, paragraph);
        } else {
            prose(out, paragraph);
        }
    }
}

/// The paragraph that begins with "Returns": each -errno becomes an entry of a list. A line that is not indented and does
/// not begin with one is prose again.
fn returns(out: &mut String, paragraph: &[String]) {
    let mut parts: Vec<(bool, String)> = Vec::new();
    for line in paragraph {
        let error = line.starts_with("-E");
        let goes_on = if error { false } else { parts.last().is_some_and(|(e, _)| !*e || line.starts_with(' ')) };
        let kernel = line.starts_with("Kernel: ");
        match parts.last_mut() {
            Some((_, text)) if goes_on && !kernel => {
                text.push(' ');
                text.push_str(line.trim());
            }
            Some((true, text)) if error => {
                text.push(' ');
                text.push_str(line);
            }
            _ => parts.push((error, line.clone())),
        }
    }
    for (is_errors, text) in parts {
        if !is_errors {
            let _ = writeln!(out, ".PP\n{}", wrapped(&text));
            continue;
        }
        let errors = labels(&text, |label| label.split(", ").all(|name| name.starts_with("-E")));
        for (n, (start, label)) in errors.iter().enumerate() {
            let end = errors.get(n + 1).map_or(text.len(), |(next, _)| *next);
            let _ = writeln!(out, ".TP\n.B {}\n{}", escaped(label), wrapped(text[start + label.len() + 1..end].trim()));
        }
    }
}

/// Where in `text` a sentence begins with a label that `is_label` accepts ("gpa, len: ..."), and the label.
fn labels(text: &str, is_label: impl Fn(&str) -> bool) -> Vec<(usize, &str)> {
    let starts = std::iter::once(0).chain(text.match_indices(". ").map(|(at, _)| at + 2));
    let label = |start: usize| {
        let end = start + text[start..].find(": ")?;
        is_label(&text[start..end]).then_some((start, &text[start..end]))
    };
    starts.filter_map(label).collect()
}

fn fields(out: &mut String, structure: &Item) {
    let mut lines = structure.code.iter().map(String::as_str).skip(1);
    let mut comment = Vec::new();
    while let Some(line) = lines.next() {
        if let Some(text) = comment_at(line, &mut lines) {
            comment = text;
        } else if line != "};" {
            let _ = writeln!(out, ".TP\n\\fB{}\\fR", escaped(line.trim()));
            in_item(out, &comment);
        }
    }
}

fn in_item(out: &mut String, comment: &[String]) {
    for (n, paragraph) in comment.split(|line| line.is_empty()).enumerate() {
        let _ = writeln!(out, "{}{}", if n > 0 { ".IP\n" } else { "" }, wrapped(&joined(paragraph)));
    }
}

// ---- Text for roff ----

fn joined(lines: &[String]) -> String {
    lines.iter().map(|line| line.trim()).collect::<Vec<_>>().join(" ")
}

fn code_line(out: &mut String, line: &str) {
    let line = escaped(line).replace('-', "\\-").replace("\\\\-", "\\-");
    let _ = writeln!(out, "{}{line}", if line.starts_with(['.', '\'']) { "\\&" } else { "" });
}

/// Characters that mean something to roff; a minus sign that is not a hyphen.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 16);
    let mut before = ' ';
    for (at, c) in text.char_indices() {
        match c {
            '\\' => out.push_str("\\e"),
            '^' => out.push_str("\\(ha"),
            '~' => out.push_str("\\(ti"),
            '`' => out.push_str("\\(ga"),
            '\'' => out.push_str("\\(aq"),
            '-' => {
                let hyphen = before.is_alphanumeric() && text[at + 1..].starts_with(char::is_alphanumeric);
                out.push_str(if hyphen { "-" } else { "\\-" });
            }
            c => out.push(c),
        }
        before = c;
    }
    out
}

/// One word of prose: names from the header in bold.
fn word(text: &str) -> String {
    let name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    // *word*: in italics. A star elsewhere is C.
    if let Some((inside, after)) = text.strip_prefix('*').and_then(|rest| rest.split_once('*')) {
        if inside.chars().all(|c| c.is_alphabetic() || c == '-') {
            return format!("\\fI{}\\fR{}", escaped(inside), escaped(after));
        }
    }
    let start = text.find("kuf_").into_iter().chain(text.find("KUF_")).min();
    match start {
        Some(start) if start == 0 || !text[..start].ends_with(name) => {
            let end = start + text[start..].find(|c| !name(c)).unwrap_or(text.len() - start);
            format!("{}\\fB{}\\fR{}", escaped(&text[..start]), &text[start..end], word(&text[end..]))
        }
        _ => escaped(text),
    }
}

/// Prose, a new line after each sentence and before column 100.
fn wrapped(text: &str) -> String {
    // What is between backquotes is typed as it stands.
    let mut marked = String::new();
    for (n, part) in text.split('`').enumerate() {
        let code = n % 2 == 1;
        marked.push_str(&if code { part.replace(' ', "\u{a0}") } else { part.to_owned() });
    }
    let mut lines = vec![String::new()];
    for raw in marked.split(' ').filter(|word| !word.is_empty()) {
        let word = if raw.contains('\u{a0}') {
            format!("\\fB{}\\fR", escaped(&raw.replace('\u{a0}', " ")))
        } else {
            word(raw)
        };
        let line = lines.last_mut().expect("never empty");
        let sentence_ended = line.ends_with('.') && raw.starts_with(char::is_uppercase);
        if line.is_empty() {
            line.push_str(&word);
        } else if sentence_ended || line.len() + word.len() > 98 {
            lines.push(word);
        } else {
            line.push(' ');
            line.push_str(&word);
        }
    }
    for line in &mut lines {
        if line.starts_with(['.', '\'']) {
            line.insert_str(0, "\\&");
        }
    }
    lines.join("\n")
}
