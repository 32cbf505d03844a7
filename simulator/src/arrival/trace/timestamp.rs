//! Calendar times of traces.

use plumbline_schema::Nanos;

/// Reads `2023-11-16 18:15:46.6805900`, with `T` or a blank, any number of decimals or none, and `Z`, `+00:00` or
/// nothing behind, as the time since 1970. `None` for anything else, and for years outside 1970 to 2199.
pub(super) fn parse(text: &str) -> Option<Nanos> {
    let (date, time) = text.trim().split_once([' ', 'T'])?;
    let mut parts = date.splitn(3, '-');
    let (year, month, day) =
        (digits(parts.next()?, 4)?, digits(parts.next()?, 2)?, digits(parts.next()?, 2)?);
    let (time, offset_s) = split_zone(time)?;
    let (clock, decimals) = time.split_once('.').map_or((time, None), |(clock, rest)| (clock, Some(rest)));
    let mut parts = clock.splitn(3, ':');
    let (hour, minute, second) =
        (digits(parts.next()?, 2)?, digits(parts.next()?, 2)?, digits(parts.next()?, 2)?);
    let is_time = hour < 24 && minute < 60 && second <= 60;
    if !(1970..2200).contains(&year) || !is_time || !(1..=days_in(year, month)?).contains(&day) {
        return None;
    }
    let seconds = days_since_1970(year, month, day) * 86_400 + hour * 3_600 + minute * 60 + second - offset_s;
    let seconds = u64::try_from(seconds).ok()?;
    Some(Nanos(seconds * 1_000_000_000 + decimals.map_or(Some(0), nanos)?))
}

/// A number of exactly `length` digits.
fn digits(text: &str, length: usize) -> Option<i64> {
    let is_number = text.len() == length && text.bytes().all(|byte| byte.is_ascii_digit());
    if is_number { text.parse().ok() } else { None }
}

/// Decimals of a second; what is finer than a nanosecond is cut.
fn nanos(decimals: &str) -> Option<u64> {
    if decimals.is_empty() || !decimals.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    format!("{decimals:0<9}")[..9].parse().ok()
}

/// The time without its zone, and the zone's seconds east of Greenwich.
fn split_zone(time: &str) -> Option<(&str, i64)> {
    if let Some(time) = time.strip_suffix('Z') {
        return Some((time, 0));
    }
    let Some(at) = time.find(['+', '-']) else { return Some((time, 0)) };
    let (hours, minutes) = time[at + 1..].split_once(':')?;
    let (hours, minutes) = (digits(hours, 2)?, digits(minutes, 2)?);
    let seconds = hours * 3_600 + minutes * 60;
    let is_zone = hours < 24 && minutes < 60;
    is_zone.then(|| (&time[..at], if time[at..].starts_with('-') { -seconds } else { seconds }))
}

const fn is_leap(year: i64) -> bool {
    year % 4 == 0 && (year % 100 != 0 || year % 400 == 0)
}

fn days_in(year: i64, month: i64) -> Option<i64> {
    match month {
        1 | 3 | 5 | 7 | 8 | 10 | 12 => Some(31),
        4 | 6 | 9 | 11 => Some(30),
        2 => Some(if is_leap(year) { 29 } else { 28 }),
        _ => None,
    }
}

fn days_since_1970(year: i64, month: i64, day: i64) -> i64 {
    let years: i64 = (1970..year).map(|year| if is_leap(year) { 366 } else { 365 }).sum();
    let months: i64 = (1..month).filter_map(|month| days_in(year, month)).sum();
    years + months + day - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calendar_times_are_read_with_and_without_zone() {
        let ns = |text: &str| parse(text).map(|time| time.0);
        assert_eq!(ns("1970-01-01 00:00:00"), Some(0));
        // `date -u -d ... +%s` gives 1700158546 and 1709164800.
        assert_eq!(ns("2023-11-16 18:15:46.6805900"), Some(1_700_158_546_680_590_000));
        assert_eq!(ns("2024-02-29T00:00:00.1234567891Z"), Some(1_709_164_800_123_456_789));
        assert_eq!(ns("2023-11-16 18:15:46+00:00"), ns("2023-11-16 18:15:46"));
        assert_eq!(ns("2023-11-16 19:45:46+01:30"), ns("2023-11-16 18:15:46"));
        assert_eq!(ns("2023-11-16 18:15:46.5-01:00"), ns("2023-11-16 19:15:46.5"));
        for wrong in [
            "",
            "2023-11-16",
            "2023-11-31 00:00:00",
            "2023-02-29 00:00:00",
            "2023-13-01 00:00:00",
            "2023-11-16 24:00:00",
            "2023-11-16 18:15",
            "2023-11-16 18:15:46.",
            "2023-11-16 18:15:46.5x",
            "+023-11-16 18:15:46",
            "2023-11-16 18:15:46+1:00",
            "1969-12-31 23:59:59",
            "1970-01-01 00:00:00+01:00",
            "2023-11-16\u{e9}18:15:46",
        ] {
            assert_eq!(ns(wrong), None, "{wrong}");
        }
    }
}
