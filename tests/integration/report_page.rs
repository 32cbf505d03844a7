//! `report.html` in a browser: from a file, offline, at two widths, light, dark and on paper.
//!
//! The browser is a Chromium: `PLUMB_CHROMIUM`, or the first of the usual names on `PATH`. Without one the test says so
//! and ends; what can be checked without one is checked in the validator.

use std::{
    env, fs,
    path::{Path, PathBuf},
    time::Duration,
};

use assert_cmd::Command;

use crate::support::{arg, stdout_of};

const NAMES: [&str; 5] =
    ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell"];

/// Generous: the page itself takes well below a second.
const LIMIT: Duration = Duration::from_secs(120);

/// A desktop's window and a phone's.
const WIDTHS: [u32; 2] = [1280, 400];

/// Opens every case and tells the page around it how wide its window and its content are.
const MEASURE: &str = "<script>document.querySelectorAll('details').forEach(d => d.open = true);\
    parent.postMessage('widths ' + innerWidth + ' ' + document.documentElement.scrollWidth + ' end', '*')</script>";

fn find() -> Option<PathBuf> {
    if let Some(path) = env::var_os("PLUMB_CHROMIUM") {
        return Some(path.into());
    }
    let folders: Vec<_> = env::split_paths(&env::var_os("PATH")?).collect();
    NAMES
        .iter()
        .flat_map(|name| folders.iter().map(move |folder| folder.join(name)))
        .find(|path| path.is_file())
}

struct Browser {
    path: PathBuf,
    /// Its profile and what it makes.
    folder: PathBuf,
}

impl Browser {
    /// Opens a page; what the browser prints, and what it logs.
    fn open(&self, page: &Path, width: u32, more: &[&str]) -> (String, String) {
        let profile = self.folder.join("profile");
        let mut command = Command::new(&self.path);
        // No sandbox: tests run as root in containers. Names resolve to nothing: a page that asks for one fails.
        command.args([
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--no-first-run",
        ]);
        command.args(["--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr"]);
        command.arg(format!("--user-data-dir={}", profile.display()));
        command
            .arg(format!("--window-size={width},1600"))
            .args(more)
            .arg(format!("file://{}", page.display()));
        let output = command.timeout(LIMIT).output().expect("the browser starts");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(output.status.success(), "{}: {}", self.path.display(), text(&output.stderr));
        (text(&output.stdout), text(&output.stderr))
    }

    /// The lines that the page wrote to the console.
    fn console(&self, page: &Path) -> Vec<String> {
        let (_, log) = self.open(page, WIDTHS[0], &["--dump-dom"]);
        log.lines().filter(|line| line.contains("CONSOLE")).map(str::to_owned).collect()
    }

    fn picture(&self, page: &Path, name: &str, more: &[&str]) -> Vec<u8> {
        let path = self.folder.join(name);
        let screenshot = format!("--screenshot={}", path.display());
        self.open(page, WIDTHS[0], &[&[screenshot.as_str()], more].concat());
        let bytes = fs::read(&path).expect("a screenshot");
        assert!(bytes.starts_with(b"\x89PNG") && bytes.len() > 10_000, "{name}: {} bytes", bytes.len());
        bytes
    }
}

/// A copy of the page beside it, with more before its end.
fn with_script(page: &Path, script: &str) -> PathBuf {
    let text = fs::read_to_string(page).expect("the page");
    let copy = page.with_file_name("copy.html");
    fs::write(&copy, text.replace("</body>", &format!("{script}</body>"))).expect("a copy");
    copy
}

/// A page that shows the copy in a frame of a width that no window of the browser goes down to.
fn framed(folder: &Path, width: u32) -> PathBuf {
    let text = format!(
        "<!DOCTYPE html><title>none</title><script>onmessage = e => document.title = e.data</script>\
         <iframe src=\"copy.html\" style=\"border: 0; width: {width}px; height: 1600px\"></iframe>"
    );
    let path = folder.join("framed.html");
    fs::write(&path, text).expect("a frame");
    path
}

#[test]
fn the_report_page_works_in_a_browser() {
    let Some(path) = find() else {
        println!("skipped: no Chromium on PATH, and PLUMB_CHROMIUM names none");
        return;
    };
    let folder = tempfile::tempdir().expect("folder");
    let report = folder.path().join("report");
    let cases = ["--case", "qwen3-0.6b-graph/conv-q8", "--case", "static-b128-p256", "--case", "sarathi"];
    stdout_of([&["validate", "--simulations", "1", "--out", arg(&report)], cases.as_slice()].concat());
    let page = report.join("report.html");
    let browser = Browser { path, folder: folder.path().to_path_buf() };

    assert_eq!(browser.console(&page), [""; 0], "the console is silent");
    let shouting = with_script(&page, "<script>console.error('heard')</script>");
    assert!(browser.console(&shouting).iter().any(|line| line.contains("heard")), "the console is heard");

    with_script(&page, MEASURE);
    for width in WIDTHS {
        let (dom, _) = browser.open(&framed(&report, width), WIDTHS[0], &["--dump-dom"]);
        let widths = dom.split("<title>widths ").nth(1).expect("the script ran").split(" end").next();
        let widths: Vec<u32> =
            widths.unwrap_or_default().split(' ').map(|width| width.parse().expect("a width")).collect();
        assert_eq!(widths[0], width, "the window");
        assert!(widths[1] <= width, "the page is {} px wide in a window of {width}", widths[1]);
    }

    let light = browser.picture(&page, "light.png", &["--blink-settings=preferredColorScheme=1"]);
    let dark = browser.picture(&page, "dark.png", &["--blink-settings=preferredColorScheme=0"]);
    assert!(light != dark, "dark looks like light");

    let paper = folder.path().join("paper.pdf");
    browser.open(&page, WIDTHS[0], &[&format!("--print-to-pdf={}", paper.display())]);
    let bytes = fs::read(&paper).expect("a PDF");
    assert!(bytes.starts_with(b"%PDF") && bytes.len() > 50_000, "{} bytes", bytes.len());
}
